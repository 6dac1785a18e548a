"""Dynamic sampling and the replacement of old samples, against servers that answer what they are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rollouts import rollout, scored
from waiting import wait_until

from megatron_r1reward.config.schema import DataSection, JudgeSection, RewardSection, RunConfig
from megatron_r1reward.data.curriculum import Curriculum
from megatron_r1reward.data.loader import DataStage, PromptLoader
from megatron_r1reward.monitor.timers import Timeline
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.score import RewardScorer, Rules, count
from megatron_r1reward.rollout.accounting import Accounting, FailedPrompt
from megatron_r1reward.rollout.pool import Arrived, GenerateResult
from megatron_r1reward.training.step_sampler import StepSampler
from megatron_r1reward.types import Preference, Prompt, Rollout

SAMPLES = 4


class Builder:
    def build(self, preference: Preference, *, swapped: bool, occurrence: int | str = 0) -> Prompt:
        return Prompt(
            id=f"{preference.id}/{occurrence}", preference_id=preference.id, token_ids=(1,), image_paths=(), label=1,
            swapped=swapped,
        )  # fmt: skip


class Pool:
    """Answers `right[preference]` of the samples of a prompt rightly, all by default; None: the prompt fails."""

    def __init__(self, right: dict[str, int | None], version: int = 0) -> None:
        self.right, self.version = right, version
        self.asked: list[list[Prompt]] = []

    def submit(
        self, prompts: Sequence[Prompt], sampling: Any, *, n: int, seed: int, arrived: Arrived
    ) -> Future[GenerateResult]:
        self.asked.append(list(prompts))
        rights = {p.id: self.right.get(p.preference_id, n) for p in prompts}
        rollouts = tuple(
            rollout(p, [self.version], answer=1 if i < right else 2, sample=i)
            for p in prompts
            if (right := rights[p.id]) is not None
            for i in range(n)
        )
        for place in reversed(range(len(prompts))):
            arrived(place, [r for r in rollouts if r.prompt.id == prompts[place].id])
        failed = tuple(FailedPrompt(prompt=p, reason="refused") for p in prompts if rights[p.id] is None)
        account = Accounting(asked=len(prompts), answered=len(prompts) - len(failed), failed=len(failed))
        future: Future[GenerateResult] = Future()
        future.set_result(GenerateResult(rollouts=rollouts, failed=failed, quarantined=(), accounting=account))
        return future


class Scorer:
    rules = Rules(section=RewardSection(use_judge=False))

    def __init__(self) -> None:
        self.arrived: list[tuple[int, list[str]]] = []

    @contextmanager
    def begin(self) -> Iterator[Scorer]:
        yield self

    def add(self, slot: int, rollouts: Sequence[Rollout]) -> None:
        self.arrived.append((slot, [one.prompt.preference_id for one in rollouts]))

    def finish(self, rollouts: Any) -> Any:
        found = [scored(one) for one in rollouts]
        return found, count(found) | {"judge_cached": 1, "judge_steps_without": 0}

    score = finish


def sampler_of(
    pool: Any,
    tmp_path: Path,
    *,
    preferences: int = 12,
    batch: int = 4,
    rounds: int = 3,
    learned: Any = None,
    scorer: Any = None,
    stages: Sequence[DataStage] = (),
) -> StepSampler:
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": tmp_path}, "model": {"path": tmp_path}, "data": {"train": tmp_path / "train.jsonl"},
            "rl": {"rollout_batch_size": batch, "train_batch_size": batch, "dynamic_sampling_rounds": rounds},
            "algorithm": {"samples_per_prompt": SAMPLES},
        }
    )  # fmt: skip
    rows = [
        Preference(id=f"p{i}", question="", responses=("", ""), label=1, image_paths=()) for i in range(preferences)
    ]
    loader = PromptLoader(rows, Builder(), DataSection(train=tmp_path), seed=0, stages=stages)  # type: ignore[arg-type]
    curriculum = Curriculum(loader, learned)
    return StepSampler(pool, scorer or Scorer(), loader, config, curriculum=curriculum, timeline=Timeline(None))


def asked(pool: Pool) -> list[list[str]]:
    return [[p.preference_id for p in prompts] for prompts in pool.asked]


def first_batch(tmp_path: Path) -> list[str]:
    pool = Pool({})
    sampler_of(pool, tmp_path, rounds=0).generate(0)
    return asked(pool)[0]


def test_prompts_that_teach_nothing_are_replaced(tmp_path: Path) -> None:
    """Two of the first four are all right or all wrong; everybody else is partly right."""
    first = first_batch(tmp_path)
    pool = Pool({f"p{i}": 2 for i in range(12)} | {first[0]: 0, first[2]: SAMPLES})
    sampler = sampler_of(pool, tmp_path)
    batch = sampler.generate(0)
    assert (batch.rounds, batch.resampled, batch.uninformative) == (1, 2, 0)
    assert asked(pool)[0] == first
    others = asked(pool)[1]
    assert len(set(others)) == 2
    assert set(others).isdisjoint(first)
    order = [r.prompt.preference_id for r in batch.rollouts][::SAMPLES]
    assert order == [others[0], first[1], others[1], first[3]]
    assert batch.accounting.asked == 6
    partly = dict.fromkeys([first[1], first[3], *others], 0.5)
    assert sampler.curriculum.state() == {first[0]: 0.0, first[2]: 1.0} | partly


def test_the_cap_never_raises(tmp_path: Path) -> None:
    """Nothing is informative: after the rounds the step has a full batch all the same."""
    pool = Pool({})
    batch = sampler_of(pool, tmp_path, rounds=2).generate(0)
    assert (batch.rounds, batch.resampled, batch.uninformative) == (2, 8, 4)
    assert len(batch.rollouts) == 4 * SAMPLES
    assert len({r.prompt.id for r in batch.rollouts}) == 4
    assert [len(prompts) for prompts in pool.asked] == [4, 4, 4]
    assert len({name for names in asked(pool) for name in names}) == 12, "no preference twice in a step"


def test_the_end_of_the_data_ends_the_rounds(tmp_path: Path) -> None:
    pool = Pool({})
    batch = sampler_of(pool, tmp_path, preferences=6, rounds=10).generate(0)
    assert [len(prompts) for prompts in pool.asked] == [4, 2]
    assert (batch.rounds, batch.uninformative, len(batch.rollouts)) == (1, 4, 4 * SAMPLES)


def test_replacements_are_of_the_same_stage_of_the_curriculum(tmp_path: Path) -> None:
    stages = [DataStage(first=0, end=2, rows=(1, 3, 5, 7, 9, 11)), DataStage(first=2, end=None, rows=tuple(range(6)))]
    pool = Pool({})
    sampler = sampler_of(pool, tmp_path, rounds=10, stages=stages)
    sampler.generate(1)
    assert {name for names in asked(pool) for name in names} == {f"p{i}" for i in stages[0].rows}
    pool.asked.clear()
    sampler.generate(2)
    assert {name for names in asked(pool) for name in names} == {f"p{i}" for i in stages[1].rows}


def test_a_failed_prompt_is_replaced_and_a_failed_replacement_is_not(tmp_path: Path) -> None:
    first = first_batch(tmp_path)
    others = [f"p{i}" for i in range(12) if f"p{i}" not in first]
    pool = Pool(dict.fromkeys(first, 2) | dict.fromkeys(others) | {first[0]: None, first[1]: 0})
    batch = sampler_of(pool, tmp_path, rounds=1).generate(0)
    assert [r.prompt.preference_id for r in batch.rollouts][::SAMPLES] == [first[1], first[2], first[3]]
    assert batch.uninformative == 2


def test_without_rounds_nothing_is_replaced_or_remembered(tmp_path: Path) -> None:
    pool = Pool({})
    sampler = sampler_of(pool, tmp_path, rounds=0)
    batch = sampler.generate(0)
    assert (batch.rounds, batch.resampled, batch.uninformative, len(pool.asked)) == (0, 0, 0, 1)
    assert sampler.curriculum.state() == {}


def test_the_choice_repeats_itself_after_a_restart(tmp_path: Path) -> None:
    """The same accuracies give the same prompts; what taught nothing before comes last."""
    learned = {f"p{i}": 1.0 for i in range(10)}
    picks = []
    for _ in range(2):
        sampler = sampler_of(Pool({}), tmp_path, learned=dict(learned))
        picks.append(sampler.curriculum.draw(3, step=4, round_=1, used={"p11"}))
    assert picks[0] == picks[1]
    assert picks[0][0].preference_id == "p10"
    other = sampler_of(Pool({}), tmp_path, learned=learned).curriculum.draw(12, step=5, round_=1, used=())
    assert {p.preference_id for p in other[:2]} == {"p10", "p11"}
    assert not {p.id for p in other} & {p.id for p in picks[0]}, "another step draws other random numbers"


def test_old_samples_are_drawn_again_with_their_whole_group(tmp_path: Path) -> None:
    pool = Pool({f"p{i}": 2 for i in range(12)}, version=1)
    sampler = sampler_of(pool, tmp_path, rounds=0)
    batch = sampler.score(sampler.generate(0))
    assert sampler.replace_older_than(batch, 1) is batch

    victim = batch.scored[SAMPLES].rollout.prompt
    items = list(batch.scored)
    items[SAMPLES + 1] = scored(rollout(victim, [0, 1], sample=1))  # one token too old
    mixed = replace(batch, scored=tuple(items))
    pool.version = 2
    fresh = sampler.replace_older_than(mixed, 1)
    assert [p.id for p in pool.asked[-1]] == [victim.id]
    assert fresh.regenerated == SAMPLES
    assert [i.rollout.prompt.id for i in fresh.scored] == [i.rollout.prompt.id for i in batch.scored]
    renewed = [i.rollout for i in fresh.scored if i.rollout.prompt.id == victim.id]
    assert {span.version for r in renewed for span in r.weight_spans} == {2}
    assert fresh.generated.accounting.asked == 5
    assert (fresh.counts["unparsable"], fresh.counts["answer_1"]) == (0, len(fresh.scored))
    assert fresh.counts["judge_cached"] == 2


def test_nothing_is_sampled_after_the_end(tmp_path: Path) -> None:
    sampler = sampler_of(Pool({}), tmp_path)
    sampler.cancel()
    with pytest.raises(CancelledError):
        sampler.generate(0)


def test_responses_are_scored_as_they_come(tmp_path: Path) -> None:
    """In whatever order, but only those that stay: what dynamic sampling replaces is nobody's business."""
    scorer = Scorer()
    first = first_batch(tmp_path)
    sampler_of(Pool({}), tmp_path, rounds=0, scorer=scorer).generate(0)
    assert scorer.arrived == [(slot, [first[slot]] * SAMPLES) for slot in (3, 2, 1, 0)]

    scorer = Scorer()
    pool = Pool({f"p{i}": 2 for i in range(12)} | {first[0]: 0, first[2]: SAMPLES})
    sampler_of(pool, tmp_path, rounds=1, scorer=scorer).generate(0)
    others = asked(pool)[1]
    assert [slot for slot, _ in scorer.arrived] == [3, 1, 2, 0]
    assert [names[0] for _, names in scorer.arrived] == [first[3], first[1], others[1], others[0]]


class HeldPool(Pool):
    """Three prompts have arrived; the last one arrives when it is let go."""

    def __init__(self) -> None:
        super().__init__({})
        self.let_go = threading.Event()

    def submit(self, prompts: Sequence[Prompt], sampling: Any, **options: Any) -> Future[GenerateResult]:
        arrived = options.pop("arrived")
        late: list[tuple[int, Sequence[Rollout]]] = []

        def hold(place: int, group: Sequence[Rollout]) -> None:
            late.append((place, group)) if place == len(prompts) - 1 else arrived(place, group)

        done = super().submit(prompts, sampling, **options, arrived=hold)
        future: Future[GenerateResult] = Future()

        def release() -> None:
            assert self.let_go.wait(120)
            arrived(*late[0])
            future.set_result(done.result())

        threading.Thread(target=release).start()
        return future


@pytest.mark.parametrize("slow", ["sampling", "judge"])
def test_judge_and_servers_work_at_the_same_time(slow: str, serve: Any, tmp_path: Path) -> None:
    """The judge is asked while others are still sampled, and sampling ends while the judge still thinks."""
    server, pool = serve("1"), HeldPool()
    server.chat.close()
    judge = ConsistencyJudge(JudgeSection(), [server.url])
    sampler = sampler_of(pool, tmp_path, rounds=0, scorer=RewardScorer(RewardSection(), judge))
    with ThreadPoolExecutor(2) as threads:
        generating = threads.submit(sampler.generate, 0)
        wait_until(lambda: server.chat.inside == 1)  # all have the same reasoning: one question
        assert not generating.done()
        if slow == "sampling":
            server.chat.open()
            wait_until(lambda: len(server.requests) == 1)
        pool.let_go.set()
        generated = generating.result(120)
        scoring = threads.submit(sampler.score, generated)
        if slow == "judge":
            assert not scoring.done()
            server.chat.open()
        batch = scoring.result(120)
    assert [item.verdict for item in batch.scored] == ["consistent"] * 4 * SAMPLES
    assert [item.rollout for item in batch.scored] == list(generated.rollouts)
    assert len(server.requests) == 1
