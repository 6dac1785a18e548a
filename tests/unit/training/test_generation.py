"""Which batch is sampled when, and by which weights."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from rollouts import generated, prompt, rollout, step_rollouts

from megatron_r1reward.config.schema import AsynchronySection
from megatron_r1reward.reward.consistency import JudgeDownError
from megatron_r1reward.training.generation import RolloutProducer
from megatron_r1reward.training.sampling import GeneratedStep, StepRollouts

STEPS = 5


class Curriculum:
    def state(self) -> dict[str, float]:
        return {"a": 0.5}


class Sampler:
    """Servers that take `seconds` for a batch and answer with the weights that they held at its start and end."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.version = seconds, 0
        self.curriculum = Curriculum()
        self.generating = 0
        self.log: list[str] = []
        self.down_at: int | None = None
        self.oldest: list[tuple[int, int]] = []
        self.cancelled = threading.Event()

    def generate(self, step: int) -> GeneratedStep:
        first = self.version
        self.generating += 1
        self.log.append(f"generate {step}")
        self.cancelled.wait(self.seconds)
        self.generating -= 1
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
    producer: RolloutProducer, sampler: Sampler, steps: range = range(STEPS), seconds: float = 0.01
) -> list[tuple[int, list[int]]]:
    """What each step trained on: the batch's number and its versions."""
    trained = []
    for step in steps:
        batch = producer.take(step)
        trained.append((batch.generated.step, versions(batch)))
        time.sleep(seconds)
        producer.before_push()
        sampler.log.append(f"push {step + 1}")
        sampler.version = step + 1
    return trained


def test_synchronous_samples_by_the_weights_that_are_trained(make: Make) -> None:
    sampler = Sampler()
    assert train(make(sampler, "synchronous"), sampler) == [(step, [step, step]) for step in range(STEPS)]
    assert sampler.log == [f"{word} {step + (word == 'push')}" for step in range(STEPS)
                           for word in ("generate", "score", "push")]  # fmt: skip


@pytest.mark.parametrize(("generating", "training"), [(0.05, 0.0), (0.0, 0.05)])
def test_one_step_off_samples_by_the_weights_before_the_update(make: Make, generating: float, training: float) -> None:
    """However long the two take."""
    sampler = Sampler(generating)
    trained = train(make(sampler, "one_step_off"), sampler, seconds=training)
    assert trained == [(0, [0, 0])] + [(step, [step - 1, step - 1]) for step in range(1, STEPS)]
    order = [line for line in sampler.log if "score" not in line]
    assert order == ["generate 0", "generate 1", "push 1", "generate 2", "push 2", "generate 3", "push 3",
                     "generate 4", "push 4", "push 5"]  # fmt: skip


def test_in_flight_pushes_while_samples_are_being_drawn(make: Make) -> None:
    sampler = Sampler(0.06)
    trained = train(make(sampler, "in_flight", batches_ahead=2, max_staleness=2), sampler, seconds=0.02)
    assert [number for number, _ in trained] == list(range(STEPS))
    ages = [step - min(found) for step, found in trained]
    assert max(ages) <= 2
    assert any(len(set(found)) > 1 for _, found in trained), "no batch saw a push"


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
    sampler = Sampler(60.0)
    producer = make(sampler, "in_flight", batches_ahead=2)

    def wait_for_a_batch() -> None:
        with contextlib.suppress(CancelledError):
            producer.take(0)

    thread = threading.Thread(target=wait_for_a_batch, daemon=True)
    thread.start()
    while sampler.generating < 3:
        time.sleep(0.005)
    started = time.monotonic()
    producer.close()
    producer.close()
    assert time.monotonic() - started < 30
