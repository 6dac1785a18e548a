"""Which prompts are worth another look: those whose samples are neither all right nor all wrong."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping

import numpy as np

from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.types import Prompt

log = logging.getLogger(__name__)


class Curriculum:
    """The accuracy of each preference when it was last sampled, and the choice of prompts by it (dynamic sampling of
    DAPO, arXiv 2503.14476, section 3.2). May be used from any thread.

    Accuracies are of what a row says, so a row that was edited under its old id is a new one.

    Args:
        accuracies: observed earlier, e.g. `state()` of an interrupted run. Those of rows that are no longer there are
            forgotten. Earlier versions named rows by their ids.
        contents: id -> `ContentKeys.row` of every preference; None: rows are what their ids say.
    """

    def __init__(
        self,
        loader: PromptLoader,
        accuracies: Mapping[str, float] | None = None,
        *,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self._loader = loader
        self._keys = {row.id: row.id for row in loader.preferences} if contents is None else dict(contents)
        there = set(self._keys.values())
        named = {self._keys.get(name, name): accuracy for name, accuracy in (accuracies or {}).items()}
        self._accuracies = {key: accuracy for key, accuracy in named.items() if key in there}
        self._lock = threading.Lock()
        if forgotten := len(named) - len(self._accuracies):
            log.warning("the accuracies of %d rows that have been edited or removed since are forgotten", forgotten)

    def observe(self, preference_id: str, accuracy: float) -> None:
        """`accuracy`: share of right answers, in [0, 1]."""
        with self._lock:
            self._accuracies[self._keys[preference_id]] = accuracy

    def state(self) -> dict[str, float]:
        """By content."""
        with self._lock:
            return dict(self._accuracies)

    def draw(self, number: int, *, step: int, round_: int, used: Collection[str]) -> list[Prompt]:
        """The prompts of `number` preferences (fewer where the step's rows end) that are not in `used`.

        Preferences whose samples were all right or all wrong when last seen come last; the order is otherwise random,
        drawn from (seed, step, round). Their ids are not those of any epoch's prompts.
        """
        accuracies = self.state()
        preferences = self._loader.preferences
        order = np.random.default_rng((self._loader.seed, step, round_)).permutation(self._loader.rows_at(step))
        candidates = [int(index) for index in order if preferences[index].id not in used]
        candidates.sort(key=lambda index: not is_informative(accuracies.get(self._keys[preferences[index].id])))
        occurrence = f"{step}+{round_}"
        return [prompt for index in candidates[:number] for prompt in self._loader.prompts(index, occurrence)]


def is_informative(accuracy: float | None) -> bool:
    """Whether samples with this share of right answers differ in their reward; an unknown share may."""
    return accuracy is None or 0.0 < accuracy < 1.0
