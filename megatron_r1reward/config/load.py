"""Read a run file: TOML plus `section.key=value` overrides, everything checked, unknown keys refused."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_r1reward.config.schema import RunConfig, Section
from megatron_r1reward.files import write_text
from megatron_r1reward.hub_name import hub_name, local_folder

MODEL_KEYS = (("model", "path"), ("judge", "model_path"), ("rollout", "model_path"), ("critic", "path"))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load `path` and apply overrides left to right. Relative paths in it are relative to the working directory.

    Raises:
        ValueError: the file is missing or not TOML, a key is unknown, or a value does not fit; the message names each.
    """
    tree = _read(path)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return _with_cached_models(RunConfig.model_validate(tree))
    except ValidationError as error:
        raise ValueError(f"run file {path}:\n" + "\n".join(_explain(error))) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"run file {path} does not exist")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"run file {path} is not valid TOML: {error}") from error


def hub_models(path: Path) -> list[str]:
    """The models that a run file names as "org/name@revision".

    Raises:
        ValueError: as `load_config`.
    """
    load_config(path)
    tree = _read(path)
    named = [tree.get(section, {}).get(key) for section, key in MODEL_KEYS]
    return [name for name in dict.fromkeys(named) if name is not None and hub_name(name) is not None]


def _with_cached_models(config: RunConfig) -> RunConfig:
    """Models named "org/name@revision" by their folders in the cache of huggingface_hub. One that is not there keeps
    its name: the stage that needs it says so."""
    for section, key in MODEL_KEYS:
        value = getattr(getattr(config, section), key)
        if value is not None and hub_name(value) is not None:
            with suppress(ValueError):
                part = getattr(config, section).model_copy(update={key: local_folder(value)})
                config = config.model_copy(update={section: part})
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, name = key.split(".")
    if not separator or not sections:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (numbers, booleans, lists, quoted strings), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _known_keys(location: Sequence[int | str]) -> list[str]:
    model: type[Section] = RunConfig
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return []
        model = field.annotation
    return list(model.model_fields)


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "the file"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"unknown key: {_hint(item['loc'])}"
        elif item["type"] != "missing" and item["loc"]:
            message += f" (got {item['input']!r})"
        lines.append(f"  {where}: {message}")
    return lines


def _hint(location: Sequence[int | str]) -> str:
    *path, key = map(str, location)
    homes = [name for name in RunConfig.model_fields if path and key in _known_keys([name])]
    if len(path) == 1 and homes:
        return f"it belongs to [{homes[0]}] and means nothing in [{path[0]}]: remove it"
    close = difflib.get_close_matches(key, _known_keys(path), n=1)
    return f"did you mean {close[0]!r}?" if close else "remove it"


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as TOML that `load_config` reads back, atomically."""
    tree = config.model_dump(mode="json", exclude_none=True)
    lines = []
    for section, values in tree.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    write_text(path, "\n".join(lines))


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):  # in a list only: sections are one level deep
        return "{" + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # Strings, booleans and integers are the same in JSON and TOML but for DEL and escaped surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
