"""The cold-start set: of each preference the first right and well-formed reasoning that an annotator wrote.

R1-Reward, section 3: up to three attempts of a strong model per sample; what agrees with the label is learned first,
and the number of attempts is the difficulty.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_r1reward.data.difficulty import AttemptRecord, Reply
from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.importing import preference_row
from megatron_r1reward.reward.rules import ParsedResponse, parse_response
from megatron_r1reward.types import Label, Preference

WITHOUT_VERDICT = "without a verdict of the judge"
Judge = Callable[[Sequence[tuple[str, Label]]], Sequence[str]]  # (reasoning, answer) -> "consistent" or another verdict


@dataclass(frozen=True, kw_only=True)
class ReasoningFilter:
    """Which reasonings are learned; tags and answer do not count."""

    min_characters: int = 0
    max_characters: int | None = None
    script: str | None = None  # of most letters, by the first word of their Unicode names, e.g. "latin", "cjk"

    def problem(self, reasoning: str) -> str:
        """Why a reasoning is left out; empty where it is not."""
        if len(reasoning) < self.min_characters:
            return "too short"
        if self.max_characters is not None and len(reasoning) > self.max_characters:
            return "too long"
        if self.script is not None and script_of(reasoning) != self.script.lower():
            return "another script"
        return ""


@dataclass(frozen=True, kw_only=True)
class ColdStartSet:
    """`rows` are those of R1-Reward-RL with `response`, `difficulty` and `annotator`; `counts` say what became of every
    preference."""

    rows: tuple[dict[str, Any], ...]
    counts: Mapping[str, int]
    difficulty: Mapping[str, int]  # attempts needed -> rows
    labels: Mapping[str, int]
    annotators: Mapping[str, int]  # model -> rows
    tokens: int = 0  # spent on all attempts
    cost: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)


def script_of(text: str) -> str:
    """The script of most letters of `text` in lower case, e.g. "latin"; empty without letters."""
    scripts = Counter(unicodedata.name(letter, "").split(" ")[0].lower() for letter in text if letter.isalpha())
    return scripts.most_common(1)[0][0] if scripts else ""


def build_cold_start(
    preferences: Sequence[Preference],
    records: Sequence[AttemptRecord],
    *,
    keep: ReasoningFilter,
    judge: Judge | None = None,
) -> ColdStartSet:
    """The supervised rows of `preferences`, found in `records` by what they were asked about, not by id.

    An attempt is used when its answer is the label, it is well formed and ended by itself, and `keep` takes it; with
    `judge` when that calls its reasoning consistent, too. The first such attempt of a preference counts.
    """
    latest: dict[str, AttemptRecord] = {record.content: record for record in records}
    keys, counts = ContentKeys(), Counter[str]()
    found: list[tuple[Preference, AttemptRecord, int, ParsedResponse]] = []
    for preference in preferences:
        record = latest.get(keys.question(preference))
        if record is None:
            counts["not annotated"] += 1
        elif not record.replies:
            counts["without texts (annotated by an earlier version)"] += 1
        else:
            place, reason = _first_usable(record.replies, preference.known_label, keep)
            if place is None:
                counts[reason] += 1
            else:
                found.append((preference, record, place, parse_response(record.replies[place].text)))
    if judge is not None and found:
        verdicts = judge([(parsed.reasoning, preference.known_label) for preference, _, _, parsed in found])
        counts["not consistent, says the judge"] += sum(verdict == "inconsistent" for verdict in verdicts)
        counts[WITHOUT_VERDICT] += sum(verdict not in ("consistent", "inconsistent") for verdict in verdicts)
        found = [entry for entry, verdict in zip(found, verdicts, strict=True) if verdict == "consistent"]
    counts["used"] = len(found)
    rows = tuple(_row(preference, record, place) for preference, record, place, _ in found)
    replies = [reply for record in latest.values() for reply in record.replies]
    return ColdStartSet(
        rows=rows,
        counts={reason: number for reason, number in counts.items() if number},
        difficulty=_tally(row["difficulty"] for row in rows),
        labels=_tally(preference.label for preference, _, _, _ in found),
        annotators=_tally(row["annotator"] for row in rows),
        tokens=sum(reply.prompt_tokens + reply.completion_tokens for reply in replies),
        cost=sum(reply.cost for reply in replies),
    )


def _first_usable(replies: Sequence[Reply], label: Label, keep: ReasoningFilter) -> tuple[int | None, str]:
    """The place of the first reply to learn, or why there is none, told of the one that came nearest."""
    reasons = ["never right"]
    for place, reply in enumerate(replies):
        parsed = parse_response(reply.text)
        if parsed.answer != label:
            continue
        if not parsed.well_formed:
            reasons.append("right, but not well formed")
        elif reply.finish_reason == "length":
            reasons.append("right, but cut off")
        elif problem := keep.problem(parsed.reasoning):
            reasons.append(problem)
        else:
            return place, ""
    return None, reasons[-1]


def _row(preference: Preference, record: AttemptRecord, place: int) -> dict[str, Any]:
    return {
        **preference_row(preference),
        "response": record.replies[place].text.strip(),
        "difficulty": place + 1,
        "annotator": str(record.asked.get("model", "")),
    }


def _tally(values: Any) -> dict[str, int]:
    return {str(value): number for value, number in sorted(Counter(values).items())}


def card(built: ColdStartSet) -> str:
    """README.md of the set."""

    def table(title: str, counts: Mapping[str, Any]) -> list[str]:
        return [f"| {title} | rows |", "|---|---|", *(f"| {name} | {number} |" for name, number in counts.items()), ""]

    lines = [
        "# Cold-start set",
        "",
        f"{len(built.rows)} preferences with the first right, well-formed reasoning of an annotator, written by "
        "`r1reward data sft`. Columns: those of R1-Reward-RL, `response` (the text to learn), `difficulty` (attempts "
        "needed) and `annotator` (its model).",
        "",
        *table("preferences", built.counts),
        *table("attempts needed", built.difficulty),
        *table("label", built.labels),
        *table("annotator", built.annotators),
        f"Spent on all attempts: {built.tokens} tokens, cost {built.cost:.6g}.",
        "",
        f"Settings: {', '.join(f'{name} = {value}' for name, value in built.settings.items()) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"
