"""Read a verdict out of a response, strictly: no free-text fallback, no numeric equivalence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from megatron_r1reward.types import Label

_WELL_FORMED = re.compile(r"<think>.*?</think><answer>.*?</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
_LABELS: Final[Mapping[str, Label]] = {"1": 1, "2": 2}


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """What the rules and the judge need to know about one response."""

    answer: Label | None  # None unless the first <answer> holds exactly "1" or "2"
    well_formed: bool
    reasoning: str  # the text before <answer>, without think tags; all of it when there is no <answer>


def parse_response(text: str) -> ParsedResponse:
    """Parse a decoded response, `text` being free of special tokens.

    `well_formed` is the released code's rule: after stripping, the whole text is
    `<think>...</think><answer>...</answer>` with nothing in between (not even a space), and each opening tag occurs
    exactly once. It does not look at the answer's content. `answer` is read independently of the format.
    """
    text = text.strip()
    before, _, after = text.partition("<answer>")
    content, closing_tag, _ = after.partition("</answer>")
    # Counting first also spares the pattern the texts on which it would backtrack.
    single_tags = text.count("<think>") == 1 and text.count("<answer>") == 1
    return ParsedResponse(
        answer=_LABELS.get(content.strip()) if closing_tag else None,
        well_formed=single_tags and _WELL_FORMED.fullmatch(text) is not None,
        reasoning=_THINK_TAG.sub("", before).strip(),
    )
