"""Models by their name on the Hugging Face Hub: "org/name@revision" where a run file or a command takes a folder.

Nothing here touches the network: compute nodes often have none. `r1reward hub fetch` fills the cache beforehand.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


def hub_name(path: str | Path) -> tuple[str, str] | None:
    """(repository, revision) of "org/name@revision"; None: something else, or there is a file of that name."""
    found = _NAME.fullmatch(str(path))
    return (found["repository"], found["revision"]) if found is not None and not Path(path).exists() else None


def local_folder(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or the snapshot of "org/name@revision" in the cache of huggingface_hub.

    Raises:
        ValueError: it is not in the cache, or not all of it.
    """
    name = hub_name(path)
    if name is None:
        return Path(path)
    from huggingface_hub import snapshot_download  # half a second, for those that need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = name
    fetch = f"run `r1reward hub fetch {path}` where there is a network, with the same HF_HOME"
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ValueError(f"model {path} is not in this machine's Hugging Face cache: {fetch}") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {path} is incomplete in this machine's Hugging Face cache ({folder}): {fetch}")
    return folder


def model_name(folder: str | Path) -> str:
    """What a model may be called in public: its name on the Hub, or the last parts of its path."""
    path = Path(folder)
    if hub_name(path) is not None:
        return str(path)
    for parent in path.parents:
        if parent.name == "snapshots" and (found := _SNAPSHOT.fullmatch(parent.parent.name)) is not None:
            return f"{found['owner']}/{found['name']}@{path.name}"
    parts = [part for part in path.parts if part not in ("/", "..", ".")]
    return "/".join(parts[-2:]) if parts and parts[-1] == "hf" else "".join(parts[-1:])
