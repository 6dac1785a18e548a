"""Which dtypes weights may have, and what `config.json` says about it: servers with dtype "auto" follow that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_RUN_FILE_WORDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def check_dtype(name: str) -> str:
    """`name`, when weights may be stored so.

    Raises:
        ValueError: they may not.
    """
    if name not in WEIGHT_DTYPES:
        hint = f" ({name} is {_RUN_FILE_WORDS[name]})" if name in _RUN_FILE_WORDS else ""
        raise ValueError(f"dtype {name!r} is not for weights: give one of {', '.join(WEIGHT_DTYPES)}{hint}")
    return name


def config_for(text: str, dtypes: Iterable[str]) -> str:
    """The text of a config.json that names the dtype of the weights. It is unchanged where it does so already, and
    where the weights have several."""
    found = set(dtypes) & set(WEIGHT_DTYPES)
    if len(found) != 1:
        return text
    dtype = found.pop()
    tree = json.loads(text)
    places = list(_places(tree))
    if places and all(part[key] == dtype for part, key in places):
        return text
    for part, key in places:
        part[key] = dtype
    if not any(part is tree for part, _ in places):
        tree["torch_dtype"] = dtype  # the name that every version reads
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _places(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    parts = [tree, *(tree[name] for name in ("text_config", "vision_config") if isinstance(tree.get(name), dict))]
    return ((part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key) is not None)
