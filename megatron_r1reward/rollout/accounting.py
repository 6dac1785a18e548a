"""Exact accounting of prompts: every one that was asked is answered once, or failed with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1reward.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class FailedPrompt:
    """A prompt without rollouts, and why."""

    prompt: Prompt
    reason: str


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What became of the prompts of one or several `generate` calls. Sums with `+`."""

    asked: int = 0
    answered: int = 0  # with exactly n samples, each once
    failed: int = 0
    samples: int = 0
    quarantined: int = 0  # samples that hold a banned token id
    attempts: int = 0  # requests that were sent
    retried: int = 0  # prompts that needed more than one
    withdrawn: int = 0  # requests taken back from a server that had stopped answering
    unfinished: int = 0  # answers thrown away because a response in them was aborted or empty
    stale: int = 0  # answers thrown away because they came from weights that were not current

    def __add__(self, other: Accounting) -> Accounting:
        return Accounting(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __str__(self) -> str:
        return (
            f"{self.asked} prompts = {self.answered} answered + {self.failed} failed; {self.samples} samples, "
            f"{self.quarantined} of them quarantined; {self.attempts} requests, {self.retried} prompts retried, "
            f"{self.withdrawn} requests withdrawn, {self.unfinished} unfinished and {self.stale} stale answers"
        )


def check(
    prompts: Sequence[Prompt], n: int, samples: Sequence[Rollout], failed: Sequence[FailedPrompt], counts: Accounting
) -> None:
    """Assert that no prompt was lost and none came back twice.

    `samples` are all rollouts, quarantined ones included.
    """
    got = Counter((rollout.prompt.id, rollout.sample_index) for rollout in samples)
    lost = {failure.prompt.id for failure in failed}
    answered = {prompt.id for prompt in prompts} - lost
    assert not got or max(got.values()) == 1, f"samples that came back twice: {[k for k, v in got.items() if v > 1]}"
    assert set(got) == {(prompt_id, index) for prompt_id in answered for index in range(n)}, "a prompt was lost"
    assert counts.asked == len(prompts) == counts.answered + counts.failed
    assert (counts.answered, counts.failed) == (len(answered), len(lost))
    assert counts.samples == len(samples) == n * counts.answered
