"""Which batch is sampled when, and by which weights."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from rollouts import generated, prompt, rollout, step_rollouts
from waiting import wait_until

from megatron_r1reward.config.schema import AsynchronySection
from megatron_r1reward.reward.consistency import JudgeDownError
from megatron_r1reward.training.producer import RolloutProducer
from megatron_r1reward.training.step_sampler import GeneratedStep, StepRollouts

STEPS = 5
HANG_S = 120.0


class Curriculum:
    def state(self) -> dict[str, float]:
        return {"a": 0.5}


class Sampler:
    """Servers that answer with the weights that they held at the start and the end of a batch.

    Args:
        answers: a batch is answered when this is true of it, or when all is cancelled.
    """

    def __init__(self, answers: Callable[[int], bool] = lambda step: True) -> None:
        self.answers, self.version = answers, 0
        self.curriculum = Curriculum()
        self.log: list[str] = []
        self.down_at: int | None = None
        self.oldest: list[tuple[int, int]] = []
        self.cancelled = threading.Event()

    def generate(self, step: int) -> GeneratedStep:
        first = self.version
        self.log.append(f"generate {step}")
        wait_until(lambda: self.answers(step) or self.cancelled.is_set(), HANG_S)
        if not self.answers(step):
            self.log.append(f"give up {step}")
        return generated(step, [rollout(prompt(f"p{step}"), [first, self.version])])

    def score(self, of: GeneratedStep) -> StepRollouts:
        if of.step == self.down_at:
            raise JudgeDownError("no verdict")
        self.log.append(f"score {of.step}")
        return step_rollouts(of)

    def replace_older_than(self, batch: StepRollouts, version: int) -> StepRollouts:
        self.oldest.append((batch.generated.step, version))
        return batch

    def cancel(self) -> None:
        self.cancelled.set()


Make = Callable[..., RolloutProducer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[RolloutProducer] = []

    def producer(sampler: Sampler, mode: str, *, state: Any = None, **settings: int) -> RolloutProducer:
        section = AsynchronySection.model_validate({"mode": mode, **settings})
        made.append(RolloutProducer(sampler, section, steps=STEPS, state=state))  # type: ignore[arg-type]
        return made[-1]

    yield producer
    for one in made:
        one.close()


def versions(batch: StepRollouts) -> list[int]:
    return [span.version for item in batch.scored for span in item.rollout.weight_spans]


def train(
    producer: RolloutProducer,
    sampler: Sampler,
    steps: range = range(STEPS),
    train_on: Callable[[int], None] = lambda step: None,
) -> list[tuple[int, list[int]]]:
    """What each step trained on: the batch's number and its versions."""
    trained = []
    for step in steps:
        batch = producer.take(step)
        trained.append((batch.generated.step, versions(batch)))
        train_on(step)
        producer.before_push()
        sampler.log.append(f"push {step + 1}")
        sampler.version = step + 1
    return trained


def test_synchronous_samples_by_the_weights_that_are_trained(make: Make) -> None:
    sampler = Sampler()
    assert train(make(sampler, "synchronous"), sampler) == [(step, [step, step]) for step in range(STEPS)]
    assert sampler.log == [f"{word} {step + (word == 'push')}" for step in range(STEPS)
                           for word in ("generate", "score", "push")]  # fmt: skip


@pytest.mark.parametrize("slower", ["sampler", "trainer"])
def test_one_step_off_samples_by_the_weights_before_the_update(make: Make, slower: str) -> None:
    """However long the two take: samples are there only when the step is trained, or the other way round."""
    trained_on: list[int] = []
    sampler = Sampler((lambda step: step == 0 or step - 1 in trained_on) if slower == "sampler" else lambda step: True)
    producer = make(sampler, "one_step_off")

    def train_on(step: int) -> None:
        if slower == "trainer":
            wait_until(lambda: f"score {min(step + 1, STEPS - 1)}" in sampler.log)
        trained_on.append(step)

    trained = train(producer, sampler, train_on=train_on)
    assert trained == [(0, [0, 0])] + [(step, [step - 1, step - 1]) for step in range(1, STEPS)]
    order = [line for line in sampler.log if "score" not in line]
    assert order == ["generate 0", "generate 1", "push 1", "generate 2", "push 2", "generate 3", "push 3",
                     "generate 4", "push 4", "push 5"]  # fmt: skip


def test_in_flight_pushes_while_samples_are_being_drawn(make: Make) -> None:
    """Batches are begun two steps ahead, and each is answered only after a push."""
    sampler = Sampler(lambda step: sampler.version >= step - 1)

    def train_on(step: int) -> None:
        wait_until(lambda: {f"generate {ahead}" for ahead in range(step + 1, min(step + 3, STEPS))} <= set(sampler.log))

    trained = train(make(sampler, "in_flight", batches_ahead=2, max_staleness=2), sampler, train_on=train_on)
    assert [number for number, _ in trained] == list(range(STEPS))
    assert [step - min(found) for step, found in trained] == [0, 1, 2, 2, 2]
    assert all(len(set(found)) == 2 for step, found in trained if step >= 2), "each of them saw a push"


def test_nothing_is_sampled_beyond_the_last_step(make: Make) -> None:
    sampler = Sampler()
    train(make(sampler, "in_flight", batches_ahead=3, max_staleness=3), sampler)
    assert {line for line in sampler.log if "generate" in line} == {f"generate {step}" for step in range(STEPS)}


@pytest.mark.parametrize("mode", ["synchronous", "one_step_off", "in_flight"])
def test_every_batch_is_held_against_the_bound(make: Make, mode: str) -> None:
    sampler = Sampler()
    train(make(sampler, mode, max_staleness=2), sampler)
    assert sampler.oldest == [(step, step - 2) for step in range(STEPS)]


def test_one_step_off_goes_on_with_the_batch_that_was_ready(make: Make) -> None:
    """Through JSON, as in a checkpoint: exactly the rollouts of the run that was left alone."""
    sampler, other = Sampler(), Sampler()
    interrupted = make(sampler, "one_step_off")
    train(interrupted, sampler, range(3))
    state = json.loads(json.dumps(interrupted.state()))
    left_alone = interrupted.take(3)

    other.version = 3
    resumed = make(other, "one_step_off", state=state)
    again = resumed.take(3)
    assert again.scored == left_alone.scored
    assert versions(again) == [2, 2]
    resumed.before_push()
    assert other.log == ["generate 4", "score 4"] or other.log == ["generate 4"]
    assert json.loads(state["accuracies"]) == {"a": 0.5}


@pytest.mark.parametrize("mode", ["synchronous", "in_flight"])
def test_other_modes_sample_anew_after_a_restart(make: Make, mode: str) -> None:
    sampler, other = Sampler(), Sampler()
    interrupted = make(sampler, "one_step_off")
    train(interrupted, sampler, range(3))
    other.version = 3
    resumed = make(other, mode, state=interrupted.state())
    assert versions(resumed.take(3)) == [3, 3]


def test_in_flight_keeps_nothing(make: Make) -> None:
    sampler = Sampler()
    producer = make(sampler, "in_flight")
    train(producer, sampler, range(2))
    assert producer.state()["ready"] is None


def test_a_judge_that_is_down_is_told_to_the_step_that_needs_it(make: Make) -> None:
    sampler = Sampler()
    sampler.down_at = 2
    producer = make(sampler, "one_step_off")
    train(producer, sampler, range(2))
    assert producer.state()["ready"] is None  # and does not raise
    with pytest.raises(JudgeDownError, match="no verdict"):
        producer.take(2)


def test_closing_gives_up_what_is_being_sampled(make: Make) -> None:
    sampler = Sampler(lambda step: False)
    producer = make(sampler, "in_flight", batches_ahead=2)

    def wait_for_a_batch() -> None:
        with contextlib.suppress(CancelledError):
            producer.take(0)

    thread = threading.Thread(target=wait_for_a_batch, daemon=True)
    thread.start()
    wait_until(lambda: len(sampler.log) == 3)
    producer.close()
    producer.close()
    thread.join(HANG_S)
    assert {f"give up {step}" for step in range(3)} <= set(sampler.log), "nobody waits until they answer"
