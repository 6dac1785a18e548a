"""When rollouts are sampled: when a step asks for them, or while earlier steps train.

    synchronous    generate k | score k | train k | push k+1 | generate k+1 ...
    one_step_off   generate k+1 and score it, while k trains; the push waits until nothing is being generated, so batch
                   k+1 is sampled by the weights before update k, always
    in_flight      the same with `batches_ahead` batches, and nobody waits: a push pauses the requests in flight, which
                   go on with the new weights; the rollouts say where they switched

What was sampled under weights that are older than `max_staleness` steps when it is to be trained on is sampled again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megatron_r1reward.config.schema import AsynchronySection
from megatron_r1reward.training.step_sampler import GeneratedStep, StepRollouts, StepSampler

log = logging.getLogger(__name__)
_BATCH = TypeAdapter(StepRollouts)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    generated: Future[GeneratedStep]
    scored: Future[StepRollouts]


class RolloutProducer:
    """Scored rollouts for the steps of a run, in order; on the main rank. Generation and scoring have threads of their
    own, so they go on while the caller trains.

    Guarantees after a restart: the batch that was ready when `state()` was taken is the batch that is trained on next
    (synchronous: there is none, and the weights that will sample it are restored; one_step_off: it is in the state, so
    the run repeats itself exactly). In flight, where a response switches weights depends on timing: batches that were
    not trained on are sampled again by the restored weights; none is lost and none is trained on twice.

    Args:
        steps: of the run; nothing is sampled beyond them.
        state: of an interrupted run.
    """

    def __init__(
        self, sampler: StepSampler, section: AsynchronySection, *, steps: int, state: Mapping[str, Any] | None = None
    ) -> None:
        self._sampler, self._section, self._steps = sampler, section, steps
        self._ahead = 0 if section.mode == "synchronous" else section.batches_ahead
        self._generators = ThreadPoolExecutor(max_workers=self._ahead + 1, thread_name_prefix="generate")
        self._scorer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")  # in the order of the steps
        self._batches: dict[int, _Batch] = {}
        if state is not None and state["ready"] is not None and section.mode == "one_step_off":
            ready = _BATCH.validate_json(state["ready"])
            self._batches[ready.generated.step] = _Batch(generated=_done(ready.generated), scored=_done(ready))

    def take(self, step: int) -> StepRollouts:
        """The batch of step `step`, which the servers' present weights are the version of, and start the next ones.

        Raises:
            JudgeDownError: the judge has been silent for too long.
            ServerError: all servers have been given up.
        """
        batch = self._start(step)
        if self._section.mode == "one_step_off":
            wait([batch.generated])  # what the curriculum learns from it comes before what the next one asks
        for later in range(step + 1, min(step + 1 + self._ahead, self._steps)):
            self._start(later)
        scored = batch.scored.result()
        del self._batches[step]
        fresh = self._sampler.replace_older_than(scored, step - self._section.max_staleness)
        if fresh.regenerated:
            log.info("step %d: %d samples were too old and have been sampled again", step + 1, fresh.regenerated)
        return fresh

    def before_push(self) -> None:
        """Wait until the weights may change."""
        if self._section.mode != "in_flight":
            wait([batch.generated for batch in self._batches.values()])

    def state(self) -> dict[str, Any]:
        """JSON: what the batches ahead are and what has been learned of the prompts. Between two steps."""
        ready = None
        if self._section.mode == "one_step_off":
            for batch in self._batches.values():
                wait([batch.scored])
                if batch.scored.exception() is None:  # a failure is for the step that takes it
                    ready = _BATCH.dump_json(batch.scored.result()).decode()
        return {"ready": ready, "accuracies": json.dumps(self._sampler.curriculum.state())}

    def close(self) -> None:
        """Give up what is being sampled. Safe to call twice."""
        self._sampler.cancel()
        for batch in self._batches.values():
            batch.generated.cancel()
            batch.scored.cancel()
        self._generators.shutdown(cancel_futures=True)
        self._scorer.shutdown(cancel_futures=True)

    def _start(self, step: int) -> _Batch:
        if step not in self._batches:
            generated = self._generators.submit(self._sampler.generate, step)
            scored = self._scorer.submit(lambda: self._sampler.score(generated.result()))
            self._batches[step] = _Batch(generated=generated, scored=scored)
        return self._batches[step]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
