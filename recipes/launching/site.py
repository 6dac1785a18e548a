"""Settings of the Slurm executor: a site file, options on the command line, and what the recipes fix."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# One task: the supervisor. It is a step of its own on the first node, beside the steps that it starts.
_SRUN_ARGS = ("--nodes=1", "--ntasks=1", "--overlap", "--mem=0")
DEFAULTS: Mapping[str, Any] = {"nodes": 1, "ntasks_per_node": 1, "time": "04:00:00", "exclusive": True, "mem": "0"}
# Set by the recipes; a value from elsewhere would break them.
RESERVED = ("tunnel", "packager", "heterogeneous", "container_image", "container_mounts", "array", "dependency_type")


def read_site(path: Path | None) -> dict[str, Any]:
    """The `[slurm]` table of a TOML file: executor settings, and a table of them per stage.

    Raises:
        ValueError: the file is missing or not TOML, or holds something else.
    """
    if path is None:
        return {}
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"site file {path} does not exist") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"site file {path} is not valid TOML: {error}") from error
    if set(tree) - {"slurm"}:
        raise ValueError(f"site file {path}: unknown tables {sorted(set(tree) - {'slurm'})}; there is only [slurm]")
    return dict(tree.get("slurm", {}))


def settings_of(stage: str, site: Mapping[str, Any], options: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Settings of one stage's job: defaults, `[slurm]`, `[slurm.<stage>]`, then options `key=value`, `stage.key=value`.

    Args:
        known: what the executor takes.

    Raises:
        ValueError: an option is not of that form, or a key is unknown or reserved.
    """
    chosen = dict(DEFAULTS)
    chosen |= {key: value for key, value in site.items() if not isinstance(value, Mapping)}
    chosen |= site.get(stage, {})
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--slurm {option!r} is not of the form key=value or stage.key=value")
        prefix, dot, name = key.rpartition(".")
        if not dot or prefix == stage:
            chosen[name] = _value(text)
    for key in chosen:
        if key in RESERVED:
            raise ValueError(f"slurm setting {key!r} is not for you: {_instead(key)}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown slurm setting {key!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    extra = dict(chosen.pop("additional_parameters", None) or {})
    srun_args = list(chosen.pop("srun_args", None) or [])
    chosen = {key: value for key, value in chosen.items() if value is not False}  # exclusive=false: leave the flag out
    chosen["srun_args"] = [*_SRUN_ARGS, *srun_args]
    # Without this a job whose parent failed waits for ever, and so does the experiment.
    chosen["additional_parameters"] = {"kill-on-invalid-dep": "yes", **extra}
    return chosen


def _instead(key: str) -> str:
    if key.startswith("container"):
        return f"components run in containers, their supervisor does not: set cluster.{key} in the run file"
    return "the recipes set it"


def _value(text: str) -> Any:
    """A TOML value where it is one, else the text, also for what TOML takes for a time of day (04:00:00)."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str | list | dict) else text


def field_names(executor: type) -> list[str]:
    """What a dataclass takes."""
    return [field.name for field in dataclasses.fields(executor) if field.init]
