"""Labels, order, lengths and pictures of a set of preferences: counts that grow with no row, for `import.json`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_r1reward.types import Preference

RATIO_EDGES = np.arange(-4.25, 4.5, 0.5)  # of log2(characters of the better response / of the other)
LENGTH_EDGES = np.arange(0.0, 18.0, 1.0)  # of log2(characters of a response)
_MOST_NAMES = 200  # categories or sources that are told apart


@dataclass(kw_only=True)
class SetFigures:
    """`first_in_source`: rows whose better response stood first before the import drew an order. Histograms have one
    count per bin of the edges above; what lies outside is in the first or the last."""

    labels: Counter[int] = field(default_factory=Counter)
    first_in_source: int = 0
    longer_is_better: int = 0
    length_ratios: np.ndarray = field(default_factory=lambda: np.zeros(len(RATIO_EDGES) - 1, dtype=np.int64))
    better_lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES) - 1, dtype=np.int64))
    other_lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES) - 1, dtype=np.int64))
    images: Counter[int] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.labels.total()

    def add(self, row: Preference, *, exchanged: bool = False) -> None:
        better, other = (len(row.responses[place]) for place in (row.known_label - 1, 2 - row.known_label))
        self.labels[row.known_label] += 1
        self.first_in_source += (row.label == 1) != exchanged
        self.longer_is_better += better > other
        self.length_ratios[_bin(math.log2(better / other), RATIO_EDGES)] += 1
        self.better_lengths[_bin(math.log2(better), LENGTH_EDGES)] += 1
        self.other_lengths[_bin(math.log2(other), LENGTH_EDGES)] += 1
        self.images[len(row.image_paths)] += 1
        for names, key in ((self.categories, "category"), (self.sources, "source")):
            if key in row.metadata:
                name = row.metadata[key]
                names[name if name in names or len(names) < _MOST_NAMES else "(others)"] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "labels": {str(label): self.labels[label] for label in (1, 2)},
            "better_first_in_source": self.first_in_source,
            "longer_is_better": self.longer_is_better,
            "log2_length_ratio": _histogram(self.length_ratios, RATIO_EDGES),
            "log2_characters_of_better": _histogram(self.better_lengths, LENGTH_EDGES),
            "log2_characters_of_other": _histogram(self.other_lengths, LENGTH_EDGES),
            "images": {str(number): self.images[number] for number in sorted(self.images)},
            "categories": dict(self.categories.most_common()),
            "sources": dict(self.sources.most_common()),
        }


def _bin(value: float, edges: np.ndarray) -> int:
    step = edges[1] - edges[0]
    return min(max(int((value - edges[0]) // step), 0), len(edges) - 2)


def _histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    return {"edges": edges.tolist(), "counts": counts.tolist()}
