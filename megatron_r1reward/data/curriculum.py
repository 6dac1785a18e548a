"""Which prompts are worth another look: those whose samples are neither all right nor all wrong."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import numpy as np

from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.types import Prompt


class Curriculum:
    """The accuracy of each preference when it was last sampled, and the choice of prompts by it (dynamic sampling of
    DAPO, arXiv 2503.14476, section 3.2). May be used from any thread.

    Args:
        accuracies: observed earlier, e.g. `state()` of an interrupted run.
    """

    def __init__(self, loader: PromptLoader, accuracies: Mapping[str, float] | None = None) -> None:
        self._loader = loader
        self._accuracies = dict(accuracies or {})
        self._lock = threading.Lock()

    def observe(self, preference_id: str, accuracy: float) -> None:
        """`accuracy`: share of right answers, in [0, 1]."""
        with self._lock:
            self._accuracies[preference_id] = accuracy

    def state(self) -> dict[str, float]:
        with self._lock:
            return dict(self._accuracies)

    def draw(self, number: int, *, step: int, round_: int, used: Collection[str]) -> list[Prompt]:
        """`number` prompts (fewer where the data end) of preferences that are not in `used`.

        Preferences whose samples were all right or all wrong when last seen come last; the order is otherwise random,
        drawn from (seed, step, round). Their ids are not those of any epoch's prompts.
        """
        accuracies = self.state()
        preferences = self._loader.preferences
        order = np.random.default_rng((self._loader.seed, step, round_)).permutation(len(preferences))
        candidates = [int(index) for index in order if preferences[index].id not in used]
        candidates.sort(key=lambda index: not is_informative(accuracies.get(preferences[index].id)))
        return [self._loader.prompt(index, f"{step}+{round_}") for index in candidates[:number]]


def is_informative(accuracy: float | None) -> bool:
    """Whether samples with this share of right answers differ in their reward; an unknown share may."""
    return accuracy is None or 0.0 < accuracy < 1.0
