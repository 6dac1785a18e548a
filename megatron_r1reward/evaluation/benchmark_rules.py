"""What the public benchmarks' own scripts make of recorded verdicts, and what both orders of a pair say beside it.

    official = official_score(RULES["vl-rewardbench"], rows, right)
    ours = both_orders_score(rows, right_first, right_second)

`rows` are the published file's, in its order: a verdict belongs to a place, not to an id, because 25 ids of
VL-RewardBench and most of MM-RLHF-RewardBench's stand in several rows. A verdict is True (the better response was
chosen), False, or None (no verdict in the text).

| benchmark | groups | without a verdict |
|---|---|---|
| VL-RewardBench (Li et al., arXiv 2411.17451) | by the id's source | not counted |
| Multimodal RewardBench (Yasunaga et al., arXiv 2502.14191) | category, two split by id | a seeded coin chooses |
| pairs: any other file | by its `category` | wrong |
| MM-RLHF-RewardBench (Zhang et al., arXiv 2502.10391) | by the picture's path | wrong |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1reward.evaluation.statistics import Estimate, estimate_share

Row = Mapping[str, Any]
Verdicts = Sequence[bool | None]
_COIN_SEED = 123


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`legacy_group`: the grouping of the released R1-Reward scripts where it differs. `all_of_id`: report Acc+.

    `drawn_order`: the benchmark draws which response stands first; else they stand as in its file. `first_is_better`:
    of a row as it stands there; the coin chooses a response, and is right where that is the better one.
    """

    group: Callable[[Row], str]
    without_verdict: Literal["dropped", "wrong", "coin"]
    drawn_order: bool = False
    legacy_group: Callable[[Row], str] | None = None
    all_of_id: bool = False
    first_is_better: Callable[[Row], bool] = lambda row: True


@dataclass(frozen=True, kw_only=True)
class Tally:
    right: int
    counted: int  # rows in the denominator

    @property
    def accuracy(self) -> float | None:
        return self.right / self.counted if self.counted else None


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    accuracy: Tally
    accuracy_plus: Tally | None  # ids of which every pair is right


@dataclass(frozen=True, kw_only=True)
class OfficialScore:
    """`macro`: the unweighted mean of the groups' accuracies. `legacy`: by the grouping of the released scripts."""

    overall: GroupScore
    groups: Mapping[str, GroupScore]
    macro: float | None
    without_verdict: int
    legacy: bool


@dataclass(frozen=True, kw_only=True)
class BothOrdersScore:
    """Shares with 95 % intervals over items; an answer without a verdict is wrong.

    `agreement` is over the pairs that have a verdict in both orders, None where no pair has.
    """

    better_first: Estimate
    better_second: Estimate
    mean: Estimate
    agreement: Estimate | None
    agreement_pairs: int


def official_score(rule: Rule, rows: Sequence[Row], right: Verdicts, *, legacy: bool = False) -> OfficialScore:
    """A benchmark's own numbers.

    Args:
        right: one verdict per row, of the one order that was asked.
        legacy: group as the released R1-Reward scripts do, where no verdict is wrong; not comparable with the
            benchmark's leaderboard.

    Raises:
        ValueError: no rows, not one verdict per row, or the benchmark has no legacy grouping.
    """
    if not rows or len(rows) != len(right):
        raise ValueError(f"{len(right)} verdicts for {len(rows)} rows: give one per row, in the file's order")
    group_of = rule.legacy_group if legacy else rule.group
    if group_of is None:
        raise ValueError("this benchmark has no legacy grouping: leave the legacy option out")
    settled = _settle(rule, rows, right, without="wrong" if legacy else rule.without_verdict)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(group_name(group_of, row), []).append(place)
    groups = {name: _tally(rule, rows, settled, part) for name, part in sorted(places.items())}
    shares = [score.accuracy.accuracy for score in groups.values()]
    known = [share for share in shares if share is not None]
    return OfficialScore(
        overall=_tally(rule, rows, settled, range(len(rows))),
        groups=groups,
        macro=sum(known) / len(known) if known else None,
        without_verdict=sum(verdict is None for verdict in right),
        legacy=legacy,
    )


def both_orders_score(rows: Sequence[Row], better_first: Verdicts, better_second: Verdicts) -> BothOrdersScore:
    """Every pair in both orders, with intervals that count the rows of one id as one item.

    Args:
        better_first: whether the better response was chosen when it was Response 1, per row; second: when Response 2.

    Raises:
        ValueError: no rows, or not one verdict per row and order.
    """
    if not rows or not len(rows) == len(better_first) == len(better_second):
        raise ValueError(
            f"{len(better_first)} and {len(better_second)} verdicts for {len(rows)} rows: give one per row and order"
        )
    items = items_of(rows)
    first, second = ([float(verdict is True) for verdict in part] for part in (better_first, better_second))
    answered = [place for place, pair in enumerate(zip(better_first, better_second, strict=True)) if None not in pair]
    agree = [float(better_first[place] == better_second[place]) for place in answered]
    return BothOrdersScore(
        better_first=estimate_share(first, items),
        better_second=estimate_share(second, items),
        mean=estimate_share([(one + other) / 2 for one, other in zip(first, second, strict=True)], items),
        agreement=estimate_share(agree, [items[place] for place in answered]) if answered else None,
        agreement_pairs=len(answered),
    )


def group_name(group_of: Callable[[Row], str], row: Row) -> str:
    """The group of a row; "unreadable" where it lacks the columns that say so, as a damaged line does."""
    try:
        return group_of(row)
    except KeyError:
        return "unreadable"


def id_of(row: Row) -> str | None:
    """The id that the published file gives a row; None: none."""
    name = row.get("id", row.get("ID"))
    return None if name is None else str(name)


def items_of(rows: Sequence[Row]) -> list[Hashable]:
    """The rows of one id are one item."""
    return [_item(row, place) for place, row in enumerate(rows)]


def _settle(
    rule: Rule, rows: Sequence[Row], right: Verdicts, *, without: Literal["dropped", "wrong", "coin"]
) -> list[bool | None]:
    """What counts for each row: None where it is left out of the denominator."""
    if without == "dropped":
        return list(right)
    coin = random.Random(_COIN_SEED)  # tossed for rows without a verdict only, as in the official script

    def missing(row: Row) -> bool:
        return without == "coin" and (coin.random() < 0.5) == rule.first_is_better(row)

    return [missing(row) if verdict is None else verdict for row, verdict in zip(rows, right, strict=True)]


def _tally(rule: Rule, rows: Sequence[Row], settled: Verdicts, places: Sequence[int]) -> GroupScore:
    counted = [place for place in places if settled[place] is not None]
    accuracy = Tally(right=sum(settled[place] is True for place in counted), counted=len(counted))
    if not rule.all_of_id:
        return GroupScore(accuracy=accuracy, accuracy_plus=None)
    whole: dict[Hashable, bool] = {}
    for place in counted:
        item = _item(rows[place], place)
        whole[item] = whole.get(item, True) and settled[place] is True
    return GroupScore(accuracy=accuracy, accuracy_plus=Tally(right=sum(whole.values()), counted=len(whole)))


def _item(row: Row, place: int) -> Hashable:
    """A row without an id is an item of its own."""
    name = id_of(row)
    return ("place", place) if name is None else ("id", name)


def _vl_group(row: Row) -> str:
    name = str(row["id"]).lower()
    if name.startswith(("hallucination_pair", "povid", "rlhf-v", "rlaif-v")):
        return "hallucination"
    return "reasoning" if name.startswith(("mathverse", "mmmu")) else "general"


def _vl_legacy_group(row: Row) -> str:
    """Case-sensitive, so that "RLHF-V" and "RLAIF-V" (301 rows) fall into general."""
    name = str(row["id"])
    if any(part in name for part in ("hallucination", "rlhf", "rlaif")):
        return "hallucination"
    return "reasoning" if "mathverse" in name or "mmmu" in name else "general"


def _multimodal_group(row: Row) -> str:
    category, name = str(row["Category"]), str(row["ID"]).lower()
    if category == "safety":
        return "safety/bias" if name.startswith("pairs") else "safety/toxicity"
    if category == "reasoning":
        return "reasoning/math" if name.startswith("math") else "reasoning/coding"
    return category


def _mm_rlhf_group(row: Row) -> str:
    path = str(row.get("video") or row.get("image"))
    for name in ("mcq", "long", "short", "safety", "video"):
        if name in path.lower():
            return name
    raise ValueError(f"no category of MM-RLHF-RewardBench in the path {path!r} of row {row.get('id')!r}")


RULES: Mapping[str, Rule] = {
    "vl-rewardbench": Rule(group=_vl_group, legacy_group=_vl_legacy_group, without_verdict="dropped", drawn_order=True),
    "multimodal-rewardbench": Rule(
        group=_multimodal_group, without_verdict="coin", first_is_better=lambda row: row.get("Better") != "Output2"
    ),
    "mm-rlhf-rewardbench": Rule(group=_mm_rlhf_group, without_verdict="wrong", all_of_id=True),
    "pairs": Rule(group=lambda row: str(row.get("category") or "all"), without_verdict="wrong"),
}


def named_source(benchmark: str, source: Path | None) -> tuple[str, Path]:
    """`bench FILE` is `bench pairs FILE`.

    Raises:
        ValueError: a benchmark without its file.
    """
    if source is not None:
        return benchmark, source
    if benchmark in RULES or not Path(benchmark).exists():
        raise ValueError(
            f"bench {benchmark}: name a FILE of pairs, or one of {', '.join(RULES)} and its published file after it"
        )
    return "pairs", Path(benchmark)
