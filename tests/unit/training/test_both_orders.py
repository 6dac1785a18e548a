"""Both orders of a pair in one group: how its prompts are drawn, kept together, and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from rollouts import rollout
from test_step_sampler import Builder, Pool, asked

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.curriculum import Curriculum
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.monitor.timers import Timeline
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.training.producer import RolloutProducer
from megatron_r1reward.training.rl_metrics import rollout_metrics
from megatron_r1reward.training.rollout_batch import compared_rewards
from megatron_r1reward.training.step_sampler import StepRollouts, StepSampler
from megatron_r1reward.types import Label, Preference, Prompt, Rollout, ScoredRollout

BATCH = 4


def config_of(tmp_path: Path, **changed: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "run": {"output_dir": tmp_path}, "model": {"path": tmp_path}, "data": {"train": tmp_path / "train.jsonl"},
        "rl": {"rollout_batch_size": BATCH, "train_batch_size": BATCH, "pairing": "both_orders"},
        "algorithm": {"samples_per_prompt": 2}, "reward": {"use_judge": False, "agreement_weight": 0.5},
    }  # fmt: skip
    return RunConfig.model_validate(tree | {name: tree.get(name, {}) | keys for name, keys in changed.items()})


class OrderedBuilder(Builder):
    def build(self, preference: Preference, *, swapped: bool, occurrence: int | str = 0) -> Prompt:
        built = super().build(preference, swapped=swapped, occurrence=occurrence)
        label = preference.label if preference.label is None or not swapped else 3 - preference.label
        return replace(built, id=f"{preference.id}/{'21' if swapped else '12'}/{occurrence}", label=label)  # type: ignore[arg-type]


def rows(count: int = 8, label: Label | None = 1) -> list[Preference]:
    return [Preference(id=f"p{i}", question="", responses=("", ""), label=label, image_paths=()) for i in range(count)]


def loader_of(config: RunConfig, preferences: Sequence[Preference]) -> PromptLoader:
    both = config.rl.pairing == "both_orders"
    return PromptLoader(preferences, OrderedBuilder(), config.data, seed=0, both_orders=both)  # type: ignore[arg-type]


def sampler_of(pool: Any, config: RunConfig, preferences: Sequence[Preference]) -> StepSampler:
    loader, scorer = loader_of(config, preferences), RewardScorer(config.reward, None)
    return StepSampler(pool, scorer, loader, config, curriculum=Curriculum(loader), timeline=Timeline(None))


class NamingPool(Pool):
    """Names the stored response `names[preference]` in every sample of both orders; "place": always the first place."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__({})
        self.names = names

    def submit(self, prompts: Sequence[Prompt], sampling: Any, **options: Any) -> Any:
        future = super().submit(prompts, sampling, **options)
        result = future.result()
        told = tuple(
            replace(one, text=f"<think>x</think><answer>{self._answer(one)}</answer>") for one in result.rollouts
        )
        future._result = replace(result, rollouts=told)
        return future

    def _answer(self, one: Rollout) -> int:
        name = self.names.get(one.prompt.preference_id, 1)
        if name == "place":
            return 1
        name = 1 + one.sample_index % 2 if name == "mixed" else name
        return 3 - name if one.prompt.swapped else name


def test_a_step_has_half_as_many_pairs_in_both_orders(tmp_path: Path) -> None:
    loader = loader_of(config_of(tmp_path), rows(6))
    single = PromptLoader(rows(6), OrderedBuilder(), config_of(tmp_path).data, seed=0)  # type: ignore[arg-type]
    seen = []
    for step in range(3):
        batch = loader.batch(step, BATCH)
        assert [prompt.swapped for prompt in batch] == [False, True] * 2
        assert [prompt.group for prompt in batch[::2]] == [prompt.group for prompt in batch[1::2]]
        assert {prompt.label for prompt in batch[::2]} == {1}
        assert {prompt.label for prompt in batch[1::2]} == {2}
        seen += [prompt.preference_id for prompt in batch[::2]]
    assert seen == [prompt.preference_id for prompt in single.batch(0, 6)], (
        "the same rows in the same order as one by one"
    )
    assert {prompt.group for prompt in single.batch(0, 6)} == {""}


def test_agreement_is_measured_over_the_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = [prompt.preference_id for prompt in loader_of(config, rows()).batch(0, BATCH)]
    sampler = sampler_of(NamingPool({first[0]: 2, first[2]: "place"}), config, rows())
    batch = sampler.score(sampler.generate(0))
    assert [one.terms["agreement"] for one in batch.scored] == [1.0] * 4 + [0.0] * 4
    assert [one.reward for one in batch.scored] == [1.0] * 4 + [1.5, 1.5, 0.5, 0.5]
    metrics = rollout_metrics(batch.scored, batch.counts, config.reward)
    assert (metrics["terms/agreement"], metrics["terms/agreement_std"], metrics["terms/format_std"]) == (0.5, 0.5, 0.0)
    assert metrics["reward/result"] == metrics["terms/result"] == 0.25


def test_a_pair_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """One order alone never decides: a pair is worth its prompts when its samples differ over both."""
    config = config_of(tmp_path, rl={"dynamic_sampling_rounds": 1})
    first = [prompt.preference_id for prompt in loader_of(config, rows()).batch(0, BATCH)]
    pool = NamingPool({first[0]: 2, first[2]: "place"} | {f"p{i}": "mixed" for i in range(8) if f"p{i}" not in first})
    sampler = sampler_of(pool, config, rows())
    batch = sampler.generate(0)
    other = asked(pool)[1]
    assert len(other) == 2
    assert other[0] == other[1] not in first
    assert [one.prompt.preference_id for one in batch.rollouts][::2] == [other[0]] * 2 + [first[2]] * 2
    assert (batch.rounds, batch.resampled, batch.uninformative) == (1, 2, 0)
    assert sampler.curriculum.state() == {first[0]: 0.0, first[2]: 0.5, other[0]: 0.5}


def test_of_pairs_without_a_label_those_that_agree_are_known_already(tmp_path: Path) -> None:
    config = config_of(tmp_path, rl={"dynamic_sampling_rounds": 1})
    first = [prompt.preference_id for prompt in loader_of(config, rows()).batch(0, BATCH)]
    pool = NamingPool({first[0]: 2, first[2]: "mixed"})
    sampler = sampler_of(pool, config, rows(label=None))
    sampler.generate(0)
    assert len(asked(pool)[1]) == 2, "one pair is asked for in place of the one whose samples all name one response"
    assert sampler.curriculum.state()[first[2]] == 0.5


def test_a_pair_whose_replacement_fails_in_one_order_stays(tmp_path: Path) -> None:
    class Failing(NamingPool):
        def submit(self, prompts: Sequence[Prompt], sampling: Any, **options: Any) -> Any:
            if self.asked:
                self.right = {prompts[0].preference_id: None}
            return super().submit(prompts, sampling, **options)

    config = config_of(tmp_path, rl={"dynamic_sampling_rounds": 1})
    pool = Failing({})
    batch = sampler_of(pool, config, rows()).generate(0)
    assert len(asked(pool)[1]) == 4
    assert asked(pool)[1][0] not in {one.prompt.preference_id for one in batch.rollouts}
    assert batch.resampled == 2
    assert len(batch.rollouts) == BATCH * 2


def test_what_is_too_old_is_sampled_again_in_both_orders(tmp_path: Path) -> None:
    config, pool = config_of(tmp_path), NamingPool({})
    pool.version = 1
    sampler = sampler_of(pool, config, rows())
    batch = sampler.score(sampler.generate(0))
    items = list(batch.scored)
    victim = items[6].rollout.prompt
    items[6] = replace(items[6], rollout=rollout(victim, [0]))
    pool.version, pool.names = 2, {victim.preference_id: "place"}
    fresh = sampler.replace_older_than(replace(batch, scored=tuple(items)), 1)
    assert asked(pool)[-1] == [victim.preference_id] * 2
    assert [one.terms["agreement"] for one in fresh.scored] == [1.0] * 4 + [0.0] * 4
    assert fresh.regenerated == 4


def test_the_batch_ahead_survives_a_restart(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        asynchrony={"mode": "one_step_off"},
        algorithm={"samples_per_prompt": 2, "truncated_importance_sampling": 2.0},
    )
    names = {f"p{i}": name for i, name in enumerate((1, 2, "place", "mixed") * 2)}
    producer = RolloutProducer(sampler_of(NamingPool(names), config, rows(label=None)), config.asynchrony, steps=3)
    producer.take(0)
    state = json.loads(json.dumps(producer.state()))
    then = producer.take(1)
    producer.close()
    pool = NamingPool(names)
    resumed = RolloutProducer(sampler_of(pool, config, rows(label=None)), config.asynchrony, steps=2, state=state)
    now = resumed.take(1)
    resumed.close()
    assert now.scored == then.scored
    assert pool.asked == []
    assert {one.rollout.prompt.label for one in now.scored} == {None}
    batch = TypeAdapter(StepRollouts)  # as a record keeps it
    assert batch.validate_json(batch.dump_json(now)) == now


# What becomes of rewards


def scored(
    answer: int, *, swapped: bool, label: Label | None, reward: float, pair: str, tokens: int = 1
) -> ScoredRollout:
    prompt = Prompt(
        id=f"{pair}/{swapped}", preference_id=pair, token_ids=(1,), image_paths=(), label=label, swapped=swapped,
        group=f"{pair}/0",
    )  # fmt: skip
    return ScoredRollout(
        rollout=rollout(prompt, [0] * tokens, answer=answer), format_reward=1.0, result_reward=reward,
        consistency_reward=0.0, reward=reward, predicted=1, verdict="not_asked", terms={"agreement": reward},
    )  # fmt: skip


def test_a_group_is_both_orders(tmp_path: Path) -> None:
    """A model that always names the first place is right in one order: alone, neither order would teach anything."""
    items = [
        scored(1, swapped=s, label=2 if s else 1, reward=0.0 if s else 1.0, pair="p")
        for s in (False, False, True, True)
    ]
    baseline = {"samples_per_prompt": 2, "baseline": "group_mean"}
    assert compared_rewards(config_of(tmp_path, algorithm=baseline), items).tolist() == [0.5, 0.5, -0.5, -0.5]
    alone = [replace(i, rollout=replace(i.rollout, prompt=replace(i.rollout.prompt, group=""))) for i in items]
    assert compared_rewards(config_of(tmp_path, algorithm=baseline), alone).tolist() == [0.0] * 4


def test_without_a_baseline_pairs_without_a_label_are_compared_with_their_like(tmp_path: Path) -> None:
    labelled = [scored(1, swapped=False, label=1, reward=r, pair="p", tokens=t) for r, t in ((2.0, 3), (0.5, 1))]
    others = [scored(1, swapped=False, label=None, reward=r, pair="q", tokens=t) for r, t in ((1.0, 1), (0.5, 3))]
    config = config_of(tmp_path)
    found = compared_rewards(config, [*labelled, *others])
    assert found[:2].tolist() == [2.0, 0.5], "others are not touched"
    means = [
        (found[part] * torch.tensor(lengths)).sum() / 4 for part, lengths in ((slice(2), [3, 1]), (slice(2, 4), [1, 3]))
    ]
    assert means[0] == pytest.approx(means[1])
    assert found[2] - found[3] == pytest.approx(0.5)
    for alone in (labelled, others):
        assert compared_rewards(config, alone).tolist() == [one.reward for one in alone]
    masked = [*labelled, replace(others[0], masked=True), others[1]]
    assert compared_rewards(config, masked)[3] == pytest.approx(float(found[:2] @ torch.tensor([3.0, 1.0]) / 4))


def test_each_of_the_users_terms_is_normalised_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(rows): return [0.0] * len(rows)\n")
    terms = [{"name": "result"}, {"name": "mine", "weight": 0.25, "function": f"{tmp_path}/f.py:f"}]
    config = config_of(
        tmp_path,
        reward={"use_judge": False, "agreement_weight": 0.0, "terms": terms},
        algorithm={"method": "gdpo", "samples_per_prompt": 2},
    )
    values = [(1.0, 10.0), (0.0, 10.0), (1.0, 30.0), (1.0, 10.0)]
    items = [
        replace(scored(1, swapped=i > 1, label=1, reward=result, pair="p"), terms={"mine": mine})
        for i, (result, mine) in enumerate(values)
    ]
    columns = torch.tensor(values, dtype=torch.float64)
    z = (columns - columns.mean(0)) / columns.std(0)
    assert compared_rewards(config, items).tolist() == pytest.approx((z[:, 0] + 0.25 * z[:, 1]).tolist(), abs=1e-6)


def test_pairing_is_named_where_it_is_needed(tmp_path: Path) -> None:
    one_order = {"pairing": "one_order"}
    with pytest.raises(ValueError, match=r"compares the two orders of a pair: set rl.pairing to 'both_orders'"):
        config_of(tmp_path, rl=one_order)
    with pytest.raises(ValueError, match=r"data.swap 'never' shows one order, and rl.pairing 'both_orders' shows both"):
        config_of(tmp_path, data={"train": tmp_path, "swap": "never"})
    with pytest.raises(ValueError, match=r"asks two prompts about a pair, and rl.rollout_batch_size 3 is odd"):
        config_of(tmp_path, rl={"rollout_batch_size": 3, "train_batch_size": 3})
    config_of(tmp_path, algorithm={"samples_per_prompt": 1, "baseline": "group_mean"})
    silent = {"agreement_weight": 0.0}
    with pytest.raises(ValueError, match=r"set algorithm.samples_per_prompt > 1, or rl.pairing to 'both_orders'"):
        config_of(tmp_path, rl=one_order, reward=silent, algorithm={"samples_per_prompt": 1, "baseline": "group_mean"})
