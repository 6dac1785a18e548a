"""Rows of an import that say the same as an earlier one, found when all are read by joining keys of fixed size.

    MergedRows    the rows in a file, in order; in memory about 150 bytes of each, whatever its texts and pictures are
    find_repeats  ids that occur again; the same pair about the same pictures; pairs that differ by one word

Pictures are compared only where texts agree: their thumbnails are in a file as well.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1reward.data.import_parts import PartRow, content_key, preference_of
from megatron_r1reward.data.near_duplicates import Pictures, Seen, looks_alike, one_word_apart, short_key
from megatron_r1reward.data.rows import RowOrigin
from megatron_r1reward.types import Label, Preference

_MOST_CANDIDATES = 64  # earlier rows of one key that a row is compared with word by word


class MergedRows:
    """Every row that was read, in order. A row has a place as far as it is usable.

    Args:
        folder: for files of its own, which may go when it is closed.
    """

    def __init__(self, folder: Path) -> None:
        self._lines, self._thumbnails = (folder / name for name in ("rows", "thumbnails"))
        self._line_sink, self._thumbnail_sink = self._lines.open("wb"), self._thumbnails.open("wb")
        self._offsets, self._first_picture = array("q"), array("q")
        self.names, self.contents, self.pairs = array("Q"), array("Q"), array("Q")
        self.labels, self.images = array("B"), array("H")
        self.near_keys, self.near_places = array("Q"), array("I")
        self._line_end = self._picture_end = 0

    def __len__(self) -> int:
        """Usable rows."""
        return len(self._offsets)

    def refuse(self, origin: RowOrigin, reason: str) -> None:
        self._write({"origin": vars(origin), "reason": reason})

    def add(self, row: PartRow, preference: Preference) -> None:
        place = len(self)
        self._offsets.append(self._line_end)
        self._write({"origin": vars(row.origin), "preference": vars(preference)})
        self._first_picture.append(self._picture_end)
        for picture in row.pictures:
            self._picture_end += self._thumbnail_sink.write(picture)
        self.names.append(short_key(preference.id))
        self.contents.append(content_key(preference))
        self.pairs.append(row.pair)
        self.labels.append(preference.known_label)
        self.images.append(len(row.pictures))
        self.near_keys.extend(row.near)
        self.near_places.extend([place] * len(row.near))

    def close(self) -> None:
        """No more rows are added; they can be read now."""
        self._line_sink.close()
        self._thumbnail_sink.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._line_end += self._line_sink.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")

    def all(self) -> Iterator[tuple[RowOrigin, Preference | None, str]]:
        """Origin, preference or None, and the reason where there is none."""
        with self._lines.open("rb") as lines:
            yield from map(_parsed, lines)

    def row(self, place: int) -> tuple[RowOrigin, Preference]:
        with self._lines.open("rb") as lines:
            lines.seek(self._offsets[place])
            origin, preference, _ = _parsed(lines.readline())
        assert preference is not None  # only usable rows have a place
        return origin, preference

    def pictures(self, place: int) -> Pictures:
        """Thumbnails of a row."""
        number = self.images[place]
        if not number:
            return ()
        start = self._first_picture[place]
        size = (self._first_picture[place + 1] if place + 1 < len(self) else self._picture_end) - start
        with self._thumbnails.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        side = size // number
        return tuple(content[at : at + side] for at in range(0, size, side))


def _parsed(line: bytes) -> tuple[RowOrigin, Preference | None, str]:
    fields = json.loads(line)
    found = fields.get("preference")
    preference = None if found is None else preference_of(found)
    return RowOrigin(**fields["origin"]), preference, fields.get("reason", "")


@dataclass(kw_only=True)
class Repeats:
    """By place: `refused` why a row is set aside; `names` its id, where it has another one than the source says."""

    refused: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    duplicates: set[int] = field(default_factory=set)
    near_duplicates: set[int] = field(default_factory=set)

    def kept(self, rows: MergedRows) -> tuple[int, Counter[Label], int]:
        """Rows that stay, their labels, and how many are text only."""
        stay = np.ones(len(rows), dtype=bool)
        stay[list(self.refused)] = False
        labels = np.bincount(np.asarray(rows.labels)[stay], minlength=3)
        found: Counter[Label] = Counter()
        for label in (1, 2):
            if labels[label]:
                found[label] = int(labels[label])
        text_only = int((np.asarray(rows.images)[stay] == 0).sum())
        return int(stay.sum()), found, text_only


def find_repeats(
    rows: MergedRows, *, ids_repeat: bool, remove_duplicates: bool, remove_near_duplicates: bool
) -> Repeats:
    """What says the same as an earlier row.

    Args:
        ids_repeat: the source may give one id to several rows; else only the first of them is used.
        remove_duplicates, remove_near_duplicates: refuse those; they are found in any case.
    """
    found = Repeats()
    _name(rows, found, ids_repeat=ids_repeat)
    for group in _groups(rows.pairs):
        _same_pairs(rows, group, found, remove=remove_duplicates)
    _near_pairs(rows, found, remove=remove_near_duplicates)
    return found


def _groups(keys: array[int], places: array[int] | None = None) -> Iterator[list[int]]:
    """Places with one key, in ascending order, where there are several."""
    values = np.asarray(keys)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    sizes = np.diff(np.append(starts, len(ordered)))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        group = order[start : start + size]
        yield (group if places is None else np.asarray(places)[group]).tolist()


def _name(rows: MergedRows, found: Repeats, *, ids_repeat: bool) -> None:
    taken: set[int] | None = None
    for first, *others in _groups(rows.names):
        contents, number = {rows.contents[first]: first}, 1
        for place in others:
            _, preference = rows.row(place)
            name = preference.id
            if not ids_repeat:
                line = rows.row(first)[0].line
                found.refused[place] = f"duplicate id {name!r}, first used in line {line}"
            elif rows.contents[place] in contents:
                same = contents[rows.contents[place]]
                line = rows.row(same)[0].line
                found.refused[place] = f"the same as line {line}, id {found.names.get(same, name)!r}"
            else:
                taken = set(rows.names) if taken is None else taken
                while short_key(f"{name}#{(number := number + 1)}") in taken:
                    pass
                found.names[place] = f"{name}#{number}"
                taken.add(short_key(found.names[place]))
                contents[rows.contents[place]] = place


def _same_pairs(rows: MergedRows, group: list[int], found: Repeats, *, remove: bool) -> None:
    seen = Seen()
    for place in group:
        if place in found.refused:
            continue
        pictures = rows.pictures(place)
        if not seen.holds(b"", pictures):
            seen.add(b"", pictures)
            continue
        found.duplicates.add(place)
        if remove:
            found.refused[place] = "question, images and responses, in some order, are those of an earlier row"


def _near_pairs(rows: MergedRows, found: Repeats, *, remove: bool) -> None:
    """Rows that differ by one word from an earlier one that is no repeat itself."""
    candidates = defaultdict[int, set[int]](set)
    for group in _groups(rows.near_keys, rows.near_places):
        distinct = list(dict.fromkeys(group))
        for number, place in enumerate(distinct[1:], start=1):
            candidates[place].update(distinct[max(0, number - _MOST_CANDIDATES) : number])
    repeats = found.duplicates | found.refused.keys()
    for place in sorted(candidates.keys() - repeats):
        _, preference = rows.row(place)
        for earlier in sorted(candidates[place] - repeats):
            origin, other = rows.row(earlier)
            if one_word_apart(preference, other) and looks_alike(rows.pictures(place), rows.pictures(earlier)):
                found.near_duplicates.add(place)
                repeats.add(place)
                if remove:
                    name = found.names.get(earlier, other.id)
                    found.refused[place] = f"it differs by one word from line {origin.line}, id {name!r}"
                break
