"""A parser: [prompt] parser = "recipes/parts/pointwise.py:verdict", for the ratings that pointwise.txt asks for."""

from __future__ import annotations

import re

_RATINGS = re.compile(r"<answer>\s*(10|[1-9])\s*,\s*(10|[1-9])\s*</answer>")


def verdict(text: str) -> int | None:
    """The response with the higher rating, 1 or 2; None where the ratings are equal or cannot be read."""
    found = _RATINGS.search(text)
    if found is None or int(found[1]) == int(found[2]):
        return None
    return 1 if int(found[1]) > int(found[2]) else 2
