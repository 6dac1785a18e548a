"""To and from the Hugging Face Hub, or a server with its protocol: push a folder, fetch a model into the cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from megatron_r1reward.config.load import hub_models
from megatron_r1reward.hub.model_card import CARD, write_card
from megatron_r1reward.hub_name import hub_name
from megatron_r1reward.model_folder.examine import served_problems
from megatron_r1reward.model_folder.prompt_policy import FILE

log = logging.getLogger(__name__)
# Of httpx or httpx2, by the version of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Weights and what loads them, the prompt, the card; no optimizer state or log that happens to lie there.
_PUSHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*"]


def push(
    folder: Path, repository: str, *, revision: str | None, private: bool, endpoint: str | None, token: str | None
) -> str:
    """Upload a trained folder with its card, which is written where there is none; returns "org/name@commit".

    Raises:
        ValueError: the folder is no complete reward model, the name is none, or the server refuses.
    """
    if _REPOSITORY.fullmatch(repository) is None:
        raise ValueError(f"{repository!r} is no repository: give ORG/NAME")
    problems = list(served_problems(folder, scalar=True))
    if problems:
        raise ValueError(f"model folder {folder} cannot be used: {'; '.join(problems)}")
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} has no {FILE}: give the folder that `r1reward sft`, `rl` or `rm` has exported")
    if not (folder / CARD).is_file():
        log.info("%s has no card: writing one", folder)
        write_card(folder, name=repository, evaluations=(), licence=None, force=False)
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line(f"{repository} at {api.endpoint}"):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message="Upload the reward model",
            allow_patterns=_PUSHED,
        )
    return f"{repository}@{commit.oid}"


def fetch(name: str, *, endpoint: str | None, token: str | None) -> Path:
    """Bring "org/name@revision" into this machine's cache, all of it; returns its folder there.

    Raises:
        ValueError: there is no such repository or revision, or the server cannot be reached.
    """
    found = hub_name(name if "@" in name else f"{name}@main")
    if found is None:
        raise ValueError(f"{name!r} is no model on the Hub: give ORG/NAME@REVISION, or a run file that names some")
    repository, revision = found
    with _one_line(f"{name} at {endpoint or HfApi().endpoint}"):
        # Asked first: the download alone would be content with what an earlier one left in the cache.
        commit = HfApi(endpoint=endpoint, token=token).model_info(repository, revision=revision).sha
        folder = Path(snapshot_download(repository, revision=revision, endpoint=endpoint, token=token))
    problems = list(served_problems(folder, scalar=True))
    if problems:
        raise ValueError(f"{name} was fetched, but cannot be used: {'; '.join(problems)}")
    log.info("%s is %s@%s in %s", name, repository, commit, folder)
    return folder


def names_in(argument: str) -> list[str]:
    """The models of a run file, or the argument itself.

    Raises:
        ValueError: the run file names none on the Hub.
    """
    if not argument.endswith(".toml"):
        return [argument]
    names = hub_models(Path(argument))
    if not names:
        raise ValueError(f'{argument} names no model as "org/name@revision": nothing to fetch')
    return names


def token_in(variable: str) -> str | None:
    """None lets huggingface_hub look where its own login put it."""
    return os.environ.get(variable) or None


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What a server answers, as one line."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{what}: access has to be asked for on its page; then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{what}: there is no such repository, or HF_TOKEN may not see it") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what}: there is no such revision") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        hint = ": set HF_TOKEN to a token that may do this" if status in (401, 403) else ""
        raise ValueError(f"{what}: the server answered {status}{hint} ({str(error).splitlines()[0][:300]})") from error
    except ConnectionError as error:  # of hf_xet, which huggingface_hub takes for large files wherever it is installed
        fix = "set HF_HUB_DISABLE_XET=1 for a server that has only the LFS protocol"
        raise ValueError(f"{what}: large files could not be sent over Xet ({str(error)[:300]}): {fix}") from error
    except _HTTP_ERROR as error:
        reason = type(error).__name__
        raise ValueError(f"{what} cannot be reached ({reason}): check the network and HF_ENDPOINT") from error
