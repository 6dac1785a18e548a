"""The rollouts of one step: its prompts sampled, sampled again where that teaches nothing, and scored."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.curriculum import Curriculum, is_informative
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.monitor.timers import Timeline
from megatron_r1reward.reward.score import RewardScorer, ScoringBatch, count
from megatron_r1reward.reward.terms import as_stored
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.pool import Arrived, GenerateResult, RolloutPool
from megatron_r1reward.types import Prompt, Rollout, ScoredRollout
from megatron_r1reward.user_parts import PartError

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
            rounds_left, orders = self._config.rl.dynamic_sampling_rounds, self._loader.orders
            groups, account = self._sample(prompts, range(len(prompts)), scoring)
            used = {prompt.preference_id for prompt in prompts}
            rounds = resampled = 0
            while rounds < rounds_left and (poor := self._uninformative(groups)):
                others = self.curriculum.draw(len(poor), step=step, round_=rounds + 1, used=used)
                if not others:
                    break
                used |= {prompt.preference_id for prompt in others}
                slots = [orders * unit + order for unit in poor for order in range(orders)]
                found, further = self._sample(others, slots, scoring)
                account += further
                rounds += 1
                for place in range(0, len(found), orders):
                    if all(found[place : place + orders]):  # a preference whose prompt failed takes nobody's place
                        for slot, group in zip(slots[place:], found[place : place + orders], strict=False):
                            groups[slot] = group
                        resampled += orders
            seconds = time.perf_counter() - started
            with self._lock:
                if self._cancelled:
                    raise CancelledError
                self._scoring[step] = scoring, stack.pop_all()
        left = orders * len(self._uninformative(groups)) if rounds_left else 0
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
        """The batch with all groups sampled anew, by the weights of now, of which a sample has a token of weights
        that are older than `version`."""
        aged = {
            item.rollout.prompt.group_id
            for item in batch.scored
            if any(span.version < version for span in item.rollout.weight_spans)
        }
        if not aged:
            return batch
        prompts = [item.rollout.prompt for item in batch.scored]
        old = {prompt.id: prompt for prompt in prompts if prompt.group_id in aged}
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
        with self._lock:
            if self._cancelled:
                raise CancelledError
            request = self._pool.submit(
                prompts,
                self._config.sampling,
                n=self._config.algorithm.samples_per_prompt,
                seed=self._config.run.seed,
                arrived=self._arrival(slots, scoring),
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
        found, orders = list(groups.values()), self._loader.orders
        if self._config.rl.dynamic_sampling_rounds:
            for place in range(0, len(prompts), orders):
                if (accuracy := self._accuracy(found[place : place + orders])) is not None:
                    self.curriculum.observe(prompts[place].preference_id, accuracy)
        return found, result.accounting

    def _arrival(self, slots: Sequence[int], scoring: ScoringBatch | None) -> Arrived:
        """What hears of the samples of each prompt, and hands on those that are sure to stay."""
        orders, replaces = self._loader.orders, self._config.rl.dynamic_sampling_rounds > 0
        come: dict[int, dict[int, Sequence[Rollout]]] = defaultdict(dict)  # by preference and order

        def arrived(place: int, group: Sequence[Rollout]) -> None:
            if scoring is None:
                return
            unit, order = divmod(place, orders)
            come[unit][order] = group
            with suppress(PartError):  # of the user's parser; this is the pool's thread, and scoring will say it again
                if not replaces:
                    scoring.add(slots[place], group)
                elif len(come[unit]) == orders and not self._uninformative([come[unit][n] for n in range(orders)]):
                    for number, one in sorted(come[unit].items()):
                        scoring.add(slots[unit * orders + number], one)

        return arrived

    def _accuracy(self, unit: Sequence[Sequence[Rollout]]) -> float | None:
        """Share of right answers among the samples of a preference's prompts that train; None where a prompt has none.
        Where nobody knows what is right, the share that names its first response."""
        rules = self._scorer.rules
        trained: list[Rollout] = []
        for group in unit:
            left = [one for one in group if rules.section.truncated != "mask" or one.finish_reason != "length"]
            if not left:
                return None
            trained += left
        parsed = [rules.parse(one) for one in trained]
        told = rules.results(trained, parsed, [False] * len(trained))
        told = [
            share if one.prompt.label is not None else float(as_stored(one.prompt, said.answer) == 1)
            for one, said, share in zip(trained, parsed, told, strict=True)
        ]
        return sum(share or 0.0 for share in told) / len(told)

    def _uninformative(self, groups: Sequence[Sequence[Rollout]]) -> list[int]:
        """The preferences of which a prompt has no samples that train, or whose samples have equal results."""
        orders = self._loader.orders
        accuracies = [self._accuracy(groups[i : i + orders]) for i in range(0, len(groups), orders)]
        return [i for i, accuracy in enumerate(accuracies) if accuracy is None or not is_informative(accuracy)]
