"""Which rows a stage trains on, and in which steps: by name, category, difficulty and a model's own accuracy.

    data.select, categories, difficulty, accuracy      the rows of the run
    [[data.curriculum]], the same keys                 of these, the rows of the steps up to `until_step`

What a file says of a row is looked up by the row's content, so that renamed rows keep it and edited ones lose it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from megatron_r1reward.config.data_section import CurriculumStage, DataSection, Selection
from megatron_r1reward.data.difficulty import difficulty_of, read_records
from megatron_r1reward.data.identity import ContentKeys, digest_of
from megatron_r1reward.data.loader import DataStage
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.types import Label, Preference

log = logging.getLogger(__name__)
Said = TypeVar("Said")
RowT = TypeVar("RowT", Preference, SftExample)


@dataclass(frozen=True, kw_only=True)
class SelectedRows(Generic[RowT]):
    """The rows of a run in the order of the data, their contents (id -> `ContentKeys.row`), and its stages, if any."""

    rows: tuple[RowT, ...]
    contents: Mapping[str, str]
    stages: tuple[DataStage, ...]

    @property
    def description(self) -> list[list[object]] | None:
        """What decides which of the rows a step sees, for the checkpoint."""
        contents = list(self.contents.values())
        found: list[list[object]] = [
            [stage.end, len(stage.rows), digest_of([contents[place] for place in stage.rows])] for stage in self.stages
        ]
        return found or None


def select_rows(
    data: Sequence[RowT],
    section: DataSection,
    *,
    batch_size: int,
    steps: Callable[[int], int],
    set_aside: Collection[str] = (),
) -> SelectedRows[RowT]:
    """Choose by the section, and say what each stage holds.

    Args:
        batch_size: rows of a step.
        steps: of the run, by the number of its rows.
        set_aside: ids that the reader could not use.

    Raises:
        ValueError: a file of the section cannot be read, or no row is left, of a stage or of all.
    """
    selector = _Selector(data, section, set_aside)
    kept = tuple(selector.rows(section, "data."))
    unlabelled = sum(map(_is_free, kept))
    text = f", {unlabelled} of them have no label" if unlabelled else ""
    log.info("%d of %d rows are trained on%s", len(kept), len(data), text)
    places = {row.id: place for place, row in enumerate(kept)}
    stages: list[DataStage] = []
    for number, criteria in enumerate(section.curriculum, start=1):
        name = f"data.curriculum stage {number}"
        rows = [row for row in selector.rows(criteria, f"{name}: ") if row.id in places]
        if not rows:
            raise ValueError(f"{name}: none of its rows is among those that the rest of [data] selects: widen one")
        first = stages[-1].end if stages else 0
        assert first is not None  # only the last stage has no end
        end = _end(criteria, first, len(rows), batch_size, name)
        stages.append(DataStage(first=first, end=end, rows=tuple(places[row.id] for row in rows)))
        _say(stages[-1], f"{name} of {len(section.curriculum)}", rows, criteria, batch_size, steps(len(kept)))
    return SelectedRows(rows=kept, contents=selector.contents(kept), stages=tuple(stages))


def _end(criteria: CurriculumStage, first: int, rows: int, batch_size: int, name: str) -> int | None:
    if criteria.epochs is not None:
        return first + math.ceil(criteria.epochs * rows / batch_size)
    if criteria.until_step is not None and criteria.until_step <= first:
        raise ValueError(f"{name}: until_step {criteria.until_step} is past: the stages before end at step {first}")
    return criteria.until_step


def _say(
    stage: DataStage,
    name: str,
    rows: Sequence[Preference] | Sequence[SftExample],
    criteria: Selection,
    batch_size: int,
    steps: int,
) -> None:
    end = steps if stage.end is None else min(stage.end, steps)
    if end <= stage.first:
        log.warning("%s begins after step %d, and the run has %d: it is never reached", name, stage.first, steps)
        return
    held = Counter(row.metadata.get("category", "without category") for row in rows)
    categories = ", ".join(f"{category} {count}" for category, count in held.most_common(8))
    wanted = ", ".join(f"{key} {value}" for key, value in criteria.criteria.items()) or "all rows"
    passes = (end - stage.first) * batch_size / len(rows)
    text = "%s, steps %d to %d: %d rows (%s), %.2f passes; %s"
    log.info(text, name, stage.first + 1, end, len(rows), wanted, passes, categories)


def in_categories(rows: Sequence[RowT], data: Sequence[RowT], categories: Collection[str], name: str) -> list[RowT]:
    """`rows` of `data` that are of these categories; all of them where none is named.

    Args:
        name: of the part of the run file, for messages.

    Raises:
        ValueError: no row of `data` has one of them.
    """
    there = sorted({row.metadata["category"] for row in data if "category" in row.metadata})
    unknown = [category for category in categories if category not in there]
    if unknown:
        raise ValueError(f"{name}categories: no row has {unknown[0]!r}; there are {', '.join(there) or 'none'}")
    return [row for row in rows if not categories or row.metadata.get("category") in categories]


class _Selector(Generic[RowT]):
    """What the files of a section say of the rows, each read once and when it is asked for."""

    def __init__(self, data: Sequence[RowT], section: DataSection, set_aside: Collection[str]) -> None:
        self._data: Sequence[RowT] = data
        self._section, self._set_aside = section, set_aside
        self._keys = ContentKeys()

    def contents(self, rows: Iterable[RowT]) -> dict[str, str]:
        return {row.id: self._keys.row(row) for row in rows}

    def rows(self, criteria: Selection, name: str) -> list[RowT]:
        """Those that meet all criteria. `name`: of the part of the run file, for messages."""
        listed = keep_selected(
            self._data, criteria.select, set_aside=self._set_aside, key=f"{name}select", keys=self._keys
        )
        kept = in_categories(listed, self._data, criteria.categories, name)
        for key, span, found, source in (
            ("difficulty", criteria.difficulty, lambda: self._difficulties, self._section.attempts),
            ("accuracy", criteria.accuracy, lambda: self._accuracies, self._section.judgements),
        ):
            if span is not None:
                kept = _between(kept, span, found(), f"{name}{key}", source)
        if not kept:
            wanted = ", ".join(f"{key} {value}" for key, value in criteria.criteria.items())
            raise ValueError(f"{name}no row of {len(self._data)} is left by {wanted}: widen them")
        return kept

    @cached_property
    def _difficulties(self) -> Mapping[str, float]:
        """Id -> attempts needed, as the file says, else the row itself."""
        own = {
            row.id: float(row.difficulty)
            for row in self._data
            if isinstance(row, SftExample) and row.difficulty is not None
        }
        path = self._section.attempts
        if path is None:
            if not own:
                raise ValueError(
                    "data.difficulty: no row has the column `difficulty` that `r1reward data sft` writes: name "
                    "data.attempts, the attempts.jsonl that `r1reward annotate` wrote"
                )
            return own
        try:
            records = {record.content: record for record in read_records(path) if record.content}
        except OSError as error:
            raise ValueError(f"data.attempts {path} cannot be read: {error.strerror}") from error
        return own | self._by_content(records, lambda record, label: difficulty_of(record, label))

    @cached_property
    def _accuracies(self) -> Mapping[str, float]:
        """Id -> share of right verdicts in both orders."""
        assert self._section.judgements is not None  # checked by the section
        choices, models, path = defaultdict[str, list[Label | None]](list), set[str](), self._section.judgements
        try:
            with path.open(encoding="utf-8") as lines:
                for fields in map(json.loads, lines):
                    if "content" in fields:  # earlier versions did not say
                        choices[fields["content"]].append(fields["choice"])
                        models.add(fields["model"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"data.judgements {path} is no judgements.jsonl of `r1reward bench`: {error!r}: name one, whole"
            ) from error
        if len(models) != 1:
            problem = f"holds judgements of {len(models)} models" if models else "does not say what its rows are about"
            raise ValueError(
                f"data.judgements {path} {problem}: run `r1reward bench pairs` on data.train, with one model and --out"
            )
        return self._by_content(choices, lambda found, label: sum(one == label for one in found) / len(found))

    def _by_content(self, found: Mapping[str, Said], measure: Callable[[Said, Label], float]) -> dict[str, float]:
        keys = {row.id: self._keys.question(row) for row in self._data}
        return {
            row.id: measure(found[keys[row.id]], row.label)
            for row in self._data
            if row.label is not None and keys[row.id] in found
        }


def _between(
    rows: Sequence[RowT], span: tuple[float, float], found: Mapping[str, float], key: str, source: Path | None
) -> list[RowT]:
    unknown = sum(not _is_free(row) and row.id not in found for row in rows)
    if unknown:
        where = "do not say it" if source is None else f"are not in {source}"
        log.warning("%s: %d of %d rows %s and are left out", key, unknown, len(rows), where)
    return [row for row in rows if _is_free(row) or (row.id in found and span[0] <= found[row.id] <= span[1])]


def _is_free(row: Preference | SftExample) -> bool:
    """Preferences without a label are kept in any case: nobody can say how difficult they are."""
    return isinstance(row, Preference) and row.label is None


def selection(preferences: Iterable[Preference], ids: Collection[str]) -> list[dict[str, str]]:
    """What `data.select` reads: the ids of rows, and what they said when they were selected."""
    keys = ContentKeys()
    return [{"id": row.id, "content": keys.row(row)} for row in preferences if row.id in ids]


def keep_selected(
    data: Sequence[RowT],
    selection: Path | None,
    *,
    set_aside: Collection[str] = (),
    key: str = "data.select",
    keys: ContentKeys | None = None,
) -> tuple[RowT, ...]:
    """The rows that the JSON list at `selection` names; all of them when there is none. Preferences without a label are
    kept in any case.

    An entry is an id, or `{"id": ..., "content": ...}`. Of the latter rows are kept that say what they said when they
    were selected, also under another id, or as a supervised row about the same pair. A warning counts those that do
    not, and those that the reader set aside.

    Args:
        key: of the run file, for messages.
        keys: that know the images already.

    Raises:
        ValueError: the file is not such a list, an id is not in the data, or no row is left.
    """
    if selection is None:
        return tuple(data)
    try:
        entries = json.loads(selection.read_text())
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__}")
        wanted = [_Selected.model_validate(entry if isinstance(entry, dict) else {"id": entry}) for entry in entries]
    except (OSError, ValueError) as error:
        raise ValueError(f"{key} {selection} is not readable as a JSON list of ids: {error}") from error
    ids = {row.id for row in data}
    content = {entry.content for entry in wanted if entry.content is not None}
    keys = keys or ContentKeys()
    found = {row.id: {keys.row(row), keys.pair(row)} for row in data} if content else {}
    there = ids.union(*found.values())
    missing = {entry.id for entry in wanted if entry.id not in ids and entry.content not in there}
    unknown = missing.difference(set_aside)
    if unknown:
        raise ValueError(f"{key} {selection}: {len(unknown)} ids are not in data.train, e.g. {min(unknown)!r}")
    by_id = {entry.id for entry in wanted if entry.content is None}
    changed = [entry.id for entry in wanted if entry.content is not None and entry.content not in there]
    changed = [identifier for identifier in changed if identifier not in missing]
    kept = tuple(row for row in data if row.id in by_id or found.get(row.id, set()) & content or _is_free(row))
    problems = []
    if changed:
        problems.append(
            f"{len(changed)} of {len(wanted)} rows have other texts, images or labels than when they were selected, "
            f"e.g. {min(changed)!r}: select again (`r1reward annotate`)"
        )
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} rows are in the quarantine file of data.train")
    if problems and not kept:
        raise ValueError(f"{key} {selection}: no row is left: {'; '.join(problems)}")
    if problems:
        log.warning("%s %s: rows are left out: %s", key, selection, "; ".join(problems))
    return kept


class _Selected(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str
    content: str | None = None
