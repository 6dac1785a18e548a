"""The rollouts of one step: its prompts sampled, sampled again where that teaches nothing, and scored."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import dataclass, replace

from megatron_r1reward.config.rl_sections import Truncated
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.curriculum import Curriculum, is_informative
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.monitor.timeline import Timeline
from megatron_r1reward.reward.rules import parse_rollout
from megatron_r1reward.reward.score import RewardScorer, ScoringBatch, count
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool
from megatron_r1reward.types import Prompt, Rollout, ScoredRollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GeneratedStep:
    """What the servers gave for step `step` (counted from 0); samples of one prompt stand next to each other."""

    step: int
    rollouts: tuple[Rollout, ...]
    accounting: Accounting
    seconds: float
    rounds: int = 0  # of dynamic sampling
    resampled: int = 0  # prompts that others took the place of
    uninformative: int = 0  # prompts left whose samples were all right or all wrong; counted by dynamic sampling only


@dataclass(frozen=True, kw_only=True)
class StepRollouts:
    """A step's rollouts, scored; those of `generated` are left out. `counts` are those of `RewardScorer.score`."""

    generated: GeneratedStep
    scored: tuple[ScoredRollout, ...]
    counts: Mapping[str, int]
    seconds: float  # of scoring
    regenerated: int = 0  # samples that were too old and have been replaced


class StepSampler:
    """Samples and scores the prompts of a step, on the main rank. `generate` and `score` may run in different threads,
    and `generate` for several steps at once.

    Args:
        curriculum: learns the accuracy of every prompt, and names those that dynamic sampling tries instead.
        timeline: gets the phases "generate" and "score".
    """

    def __init__(
        self,
        pool: RolloutPool,
        scorer: RewardScorer,
        loader: PromptLoader,
        config: RunConfig,
        *,
        curriculum: Curriculum,
        timeline: Timeline,
    ) -> None:
        self.curriculum = curriculum
        self._pool, self._scorer, self._loader, self._config = pool, scorer, loader, config
        self._timeline = timeline
        self._requests: set[Future[GenerateResult]] = set()
        self._cancelled = False
        self._scoring: dict[int, tuple[ScoringBatch, ExitStack]] = {}  # of steps that are being generated
        self._lock = threading.Lock()  # of the three above

    def generate(self, step: int) -> GeneratedStep:
        """Sample the prompts of step `step`, and with `rl.dynamic_sampling_rounds` others in place of those whose
        samples were all right or all wrong; what is left of these when the rounds are used up stays in the batch.

        Every response is scored as it comes, so that the judge works while others are still sampled.

        Raises:
            CancelledError: `cancel` was called.
            ServerError: all servers have been given up.
        """
        with self._timeline.phase("generate", step=step + 1), ExitStack() as stack:
            started = time.perf_counter()
            scoring = stack.enter_context(self._scorer.begin())
            prompts = self._loader.batch(step, self._config.rl.rollout_batch_size)
            rounds_left, cut = self._config.rl.dynamic_sampling_rounds, self._config.reward.truncated
            groups, account = self._sample(prompts, range(len(prompts)), scoring)
            used = {prompt.preference_id for prompt in prompts}
            rounds = resampled = 0
            while rounds < rounds_left and (poor := _uninformative(groups, cut)):
                others = self.curriculum.draw(len(poor), step=step, round_=rounds + 1, used=used)
                if not others:
                    break
                used |= {prompt.preference_id for prompt in others}
                found, further = self._sample(others, poor, scoring)
                account += further
                rounds += 1
                for slot, group in zip(poor, found, strict=False):
                    groups[slot] = group or groups[slot]
                    resampled += bool(group)
            seconds = time.perf_counter() - started
            with self._lock:
                if self._cancelled:
                    raise CancelledError
                self._scoring[step] = scoring, stack.pop_all()
        left = len(_uninformative(groups, cut)) if rounds_left else 0
        if left and rounds == rounds_left:
            log.info("step %d: %d prompts still teach nothing after %d more rounds", step + 1, left, rounds)
        log.debug("step %d: %s", step + 1, account)
        return GeneratedStep(
            step=step,
            rollouts=tuple(rollout for group in groups for rollout in group),
            accounting=account,
            seconds=seconds,
            rounds=rounds,
            resampled=resampled,
            uninformative=left,
        )

    def score(self, generated: GeneratedStep) -> StepRollouts:
        """Wait for the rest of the scores. Raises JudgeDownError when the judge has been silent for too long."""
        with self._lock:
            begun = self._scoring.pop(generated.step, None)
        with self._timeline.phase("score", step=generated.step + 1):
            started = time.perf_counter()
            if begun is None:
                scored, counts = self._scorer.score(generated.rollouts)
            else:
                with begun[1]:
                    scored, counts = begun[0].finish(generated.rollouts)
            seconds = time.perf_counter() - started
        return StepRollouts(
            generated=replace(generated, rollouts=()), scored=tuple(scored), counts=counts, seconds=seconds
        )

    def replace_older_than(self, batch: StepRollouts, version: int) -> StepRollouts:
        """The batch with all prompts sampled anew, by the weights of now, of which a sample has a token of weights
        that are older than `version`."""
        old = {
            item.rollout.prompt.id: item.rollout.prompt
            for item in batch.scored
            if any(span.version < version for span in item.rollout.weight_spans)
        }
        if not old:
            return batch
        step = batch.generated.step
        with self._timeline.phase("generate", step=step + 1):
            groups, account = self._sample(list(old.values()))
        new = self.score(
            replace(
                batch.generated, rollouts=tuple(rollout for group in groups for rollout in group), accounting=account
            )
        )
        replaced = {prompt_id: [i for i in new.scored if i.rollout.prompt.id == prompt_id] for prompt_id in old}
        scored: list[ScoredRollout] = []
        for item in batch.scored:
            prompt_id = item.rollout.prompt.id
            scored += replaced.pop(prompt_id, []) if prompt_id in old else [item]
        judged = {name: new.counts[name] + batch.counts[name] for name in new.counts}
        return replace(
            batch,
            generated=replace(batch.generated, accounting=batch.generated.accounting + account),
            scored=tuple(scored),
            counts=judged | count(scored) | {"judge_steps_without": new.counts["judge_steps_without"]},
            regenerated=sum(item.rollout.prompt.id in old for item in batch.scored),
        )

    def cancel(self) -> None:
        """Give up what is being generated; nothing can be generated afterwards."""
        with self._lock:
            self._cancelled = True
            requests, scoring = list(self._requests), list(self._scoring.values())
            self._scoring.clear()
        for request in requests:
            request.cancel()
        for _, stack in scoring:
            stack.close()

    def _sample(
        self, prompts: Sequence[Prompt], slots: Sequence[int] = (), scoring: ScoringBatch | None = None
    ) -> tuple[list[list[Rollout]], Accounting]:
        """The samples of each prompt, none where it failed; their accuracies go to the curriculum. `scoring` gets those
        that are sure to stay in the batch, in the slots of their prompts."""

        def arrived(place: int, group: Sequence[Rollout]) -> None:
            stays = not self._config.rl.dynamic_sampling_rounds or not _uninformative(
                [group], self._config.reward.truncated
            )
            if scoring is not None and stays:
                scoring.add(slots[place], group)

        with self._lock:
            if self._cancelled:
                raise CancelledError
            request = self._pool.submit(
                prompts,
                self._config.sampling,
                n=self._config.algorithm.samples_per_prompt,
                seed=self._config.run.seed,
                arrived=arrived,
            )
            self._requests.add(request)
        try:
            result = request.result()
        except BaseException:
            request.cancel()
            raise
        finally:
            with self._lock:
                self._requests.discard(request)
        for failure in result.failed:
            log.warning("no rollout for prompt %s: %s", failure.prompt.id, failure.reason)
        groups: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts}
        for rollout in result.rollouts:
            groups[rollout.prompt.id].append(rollout)
        if self._config.rl.dynamic_sampling_rounds:
            for prompt in prompts:
                if (accuracy := _accuracy(groups[prompt.id], self._config.reward.truncated)) is not None:
                    self.curriculum.observe(prompt.preference_id, accuracy)
        return list(groups.values()), result.accounting


def _accuracy(group: Sequence[Rollout], truncated: Truncated) -> float | None:
    """Share of right answers among the samples that train; None without any."""
    trained = [rollout for rollout in group if truncated != "mask" or rollout.finish_reason != "length"]
    if not trained:
        return None
    return sum(parse_rollout(rollout, truncated).answer == rollout.prompt.label for rollout in trained) / len(trained)


def _uninformative(groups: Sequence[Sequence[Rollout]], truncated: Truncated) -> list[int]:
    """The groups without samples that train, or with samples of equal results."""
    accuracies = [_accuracy(group, truncated) for group in groups]
    return [i for i, accuracy in enumerate(accuracies) if accuracy is None or not is_informative(accuracy)]
