"""Pointwise generative training: how ratings of single responses are asked for, read, rewarded and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up_record import elsewhere, replay_config, write_made_up_record
from PIL import Image
from pydantic import TypeAdapter
from rollouts import rollout
from test_both_orders import BATCH, config_of, rows
from test_step_sampler import Builder, Pool, asked
from transformers import AutoTokenizer

from megatron_r1reward.config.schema import ParallelSection, RewardSection, RunConfig
from megatron_r1reward.data.curriculum import Curriculum
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.data.preference import read_sft_examples
from megatron_r1reward.data.prompt import POINTWISE_TEMPLATE, TEMPLATE, PromptBuilder, is_filled
from megatron_r1reward.data.stage_data import RowLimits, kind_of, template_of
from megatron_r1reward.evaluation.scalar_evaluation import sampled_rating_accuracy
from megatron_r1reward.launch.stage_models import check_settings
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy, read_policy
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.monitor.metrics import check_metrics
from megatron_r1reward.monitor.timers import Timeline
from megatron_r1reward.parallel import setup
from megatron_r1reward.reward.readers import reader_of
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.reward.terms import orderings
from megatron_r1reward.training import rl
from megatron_r1reward.training.record import Recorder, origin_of
from megatron_r1reward.training.rl_metrics import rollout_metrics
from megatron_r1reward.training.rollout_batch import compared_rewards
from megatron_r1reward.training.step_sampler import StepRollouts, StepSampler
from megatron_r1reward.training.trained_policy import rl_policy, sft_policy
from megatron_r1reward.types import Label, Preference, Prompt, Rollout

BETTER, OTHER = [8, 5, None, 5], [5, 3, 9, None]  # ratings of the two responses of a pair
# Of each, the share of the other response's four that it is ordered rightly against; an equal one is not.
SHARES = [0.5, 0.25, 0.0, 0.25, 0.25, 0.75, 0.0, 0.0]


def pointwise(tmp_path: Path, **changed: dict[str, Any]) -> RunConfig:
    reward = {"agreement_weight": 0.0, "use_judge": False}
    changed["rl"] = {"pairing": "pointwise"} | changed.get("rl", {})
    changed["reward"] = reward | changed.get("reward", {})
    return config_of(tmp_path, **changed)


def prompt_of(*, swapped: bool, label: Label = 1, pair: str = "p") -> Prompt:
    shown: Label = label if not swapped else 2 if label == 1 else 1
    return Prompt(
        id=f"{pair}/{1 + swapped}/0", preference_id=pair, token_ids=(1,), image_paths=(), label=shown,
        swapped=swapped, group=f"{pair}/0",
    )  # fmt: skip


def rated(rating: object, *, swapped: bool, sample: int = 0, label: Label = 1, pair: str = "p") -> Rollout:
    said = rollout(prompt_of(swapped=swapped, label=label, pair=pair), [0], sample=sample)
    return replace(said, text=f"<think>x</think><answer>{'' if rating is None else rating}</answer>")


def samples_of(first: Sequence[object], second: Sequence[object], **of: Any) -> list[Rollout]:
    groups = ((False, first), (True, second))
    return [rated(one, swapped=swapped, sample=n, **of) for swapped, part in groups for n, one in enumerate(part)]


def test_a_rating_earns_the_share_that_it_is_ordered_rightly_against() -> None:
    for label, texts in ((1, samples_of(BETTER, OTHER)), (2, samples_of(OTHER, BETTER, label=2))):
        scored, counts = RewardScorer(RewardSection(use_judge=False), None, pointwise=True).score(texts)
        shares = SHARES if label == 1 else SHARES[4:] + SHARES[:4]
        forms = [one.rating is not None for one in scored]
        assert [one.result_reward for one in scored] == shares
        assert [one.reward for one in scored] == [0.5 * form + share for form, share in zip(forms, shares, strict=True)]
        assert sum(shares[:4]) == sum(shares[4:]), "each pair of samples counts once on either side"
        assert [one.predicted for one in scored] == [None] * 8
        assert (counts["unparsable"], counts["unlabelled"]) == (2, 0)


def test_a_constant_rating_earns_nothing_and_pairs_do_not_mix() -> None:
    texts = samples_of([7] * 3, [7] * 3) + samples_of([9], [2], pair="q")
    found = orderings([one.prompt for one in texts], [7] * 6 + [9, 2], [False] * 8)
    assert found == [0.0] * 6 + [1.0, 1.0]
    assert orderings([one.prompt for one in texts], [7] * 6 + [9, 2], [False] * 7 + [True]) == [0.0] * 6 + [None, 1.0]


@pytest.mark.parametrize("text", ["0", "11", "7.5", "7/10", "seven", "07", ""])
def test_what_is_not_a_whole_number_of_the_scale_is_no_rating(text: str) -> None:
    scorer = RewardScorer(RewardSection(use_judge=False), None, pointwise=True)
    (bad, good), _ = scorer.score([rated(text, swapped=False), rated(" 3\n", swapped=True)])
    assert (bad.rating, bad.format_reward, bad.reward) == (None, 0.0, 0.0)
    assert (good.rating, good.format_reward, good.reward) == (3, 1.0, 0.5)
    (compared,), _ = RewardScorer(RewardSection(use_judge=False), None).score([rated("2", swapped=False)])
    assert (compared.predicted, compared.rating) == (2, None), "a verdict about a pair is no rating"


def test_who_has_nobody_to_be_compared_with_trains_nothing() -> None:
    cut = replace(rated(2, swapped=True, pair="q"), finish_reason="length")
    texts = [rated(8, swapped=False), rated(9, swapped=False, pair="q"), cut]
    scored, _ = RewardScorer(RewardSection(use_judge=False, truncated="mask"), None, pointwise=True).score(texts)
    assert [one.masked for one in scored] == [True] * 3
    scored, _ = RewardScorer(RewardSection(use_judge=False), None, pointwise=True).score(texts)
    assert [(one.masked, one.reward) for one in scored] == [(True, 0.5), (False, 0.5), (False, 0.0)]


def test_the_group_is_the_pair(tmp_path: Path) -> None:
    scored, _ = RewardScorer(RewardSection(use_judge=False), None, pointwise=True).score(samples_of(BETTER, OTHER))
    rewards = [1.0, 0.75, 0.0, 0.75, 0.75, 1.25, 0.5, 0.0]
    mean = 5.0 / 8
    deviation = (sum((one - mean) ** 2 for one in rewards) / 7) ** 0.5
    for method, expected in {
        "stable_reinforce": rewards,
        "dr_grpo": [one - mean for one in rewards],
        "grpo": [(one - mean) / deviation for one in rewards],
        "rloo": [one - (5.0 - one) / 7 for one in rewards],
    }.items():
        config = pointwise(tmp_path, algorithm={"method": method, "samples_per_prompt": 4}, rl={})
        assert compared_rewards(config, scored).tolist() == pytest.approx(expected, abs=1e-6), method


class RatedBuilder(Builder):
    def build(self, preference: Preference, *, swapped: bool, occurrence: int | str = 0) -> Prompt:
        return replace(
            super().build(preference, swapped=swapped, occurrence=occurrence),
            id=f"{preference.id}/{1 + swapped}/{occurrence}", label=2 if swapped else 1,
        )  # fmt: skip


class RatingPool(Pool):
    """Gives each pair's better and other response the ratings `said[preference]`, by default 9 and 2."""

    def __init__(self, said: dict[str, tuple[list[int], list[int]]]) -> None:
        super().__init__({})
        self.said = said

    def told(self, one: Rollout) -> Rollout:
        ratings = self.said.get(one.prompt.preference_id, ([9], [2]))[one.prompt.swapped]
        return replace(one, text=f"<think>x</think><answer>{ratings[one.sample_index % len(ratings)]}</answer>")

    def submit(self, prompts: Sequence[Prompt], sampling: Any, **options: Any) -> Any:
        future = super().submit(prompts, sampling, **options)
        result = future.result()
        future._result = replace(result, rollouts=tuple(map(self.told, result.rollouts)))
        return future

    def generate(self, prompts: Sequence[Prompt], sampling: Any, *, n: int, seed: int) -> Any:
        return self.submit(prompts, sampling, n=n, seed=seed, arrived=lambda place, group: None).result()


def loader_of(config: RunConfig, preferences: Sequence[Preference]) -> PromptLoader:
    return PromptLoader(preferences, RatedBuilder(), config.data, seed=0, both_orders=config.rl.orders == 2)  # type: ignore[arg-type]


def sampler_of(pool: Any, config: RunConfig) -> StepSampler:
    loader, scorer = loader_of(config, rows()), RewardScorer(config.reward, None, pointwise=True)
    return StepSampler(pool, scorer, loader, config, curriculum=Curriculum(loader), timeline=Timeline(None))


def test_pairs_whose_ratings_tell_nothing_are_replaced(tmp_path: Path) -> None:
    config = pointwise(tmp_path, rl={"dynamic_sampling_rounds": 1})
    first = [prompt.preference_id for prompt in loader_of(config, rows()).batch(0, BATCH)]
    assert first[::2] == first[1::2]
    mixed = ([8, 5], [5, 3])
    said = {first[0]: ([5], [5]), first[2]: mixed} | {f"p{i}": mixed for i in range(8) if f"p{i}" not in first}
    pool = RatingPool(said)
    sampler = sampler_of(pool, config)
    batch = sampler.score(sampler.generate(0))
    other = asked(pool)[1]
    assert other[0] == other[1] not in first
    assert sampler.curriculum.state() == {first[0]: 0.0, first[2]: 0.75, other[0]: 0.75}
    assert [one.result_reward for one in batch.scored] == [1.0, 0.5, 0.5, 1.0] * 2
    metrics = rollout_metrics(batch.scored, batch.counts, config.reward)
    check_metrics(metrics)
    assert "rollout/answer_1_fraction" not in metrics
    assert (metrics["reward/result"], metrics["rating/mean"], metrics["rating/commonest_fraction"]) == (0.75, 5.25, 0.5)
    kept = TypeAdapter(StepRollouts)  # as a record keeps it
    assert kept.validate_json(kept.dump_json(batch)) == batch


def test_held_out_accuracy_counts_ties_half(tmp_path: Path) -> None:
    config = pointwise(tmp_path)
    pool = RatingPool({"p0": ([5], [5]), "p1": ([1], [2]), "p2": ([99], [2])})
    found = sampled_rating_accuracy(rows(4), pool, RatedBuilder(), config.sampling, seed=0)  # type: ignore[arg-type]
    assert found == (0.5 + 0.0 + 0.0 + 1.0) / 4


def test_a_prompt_shows_one_response_and_its_images(tiny_folder: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (56, 56), (40 * number, 0, 0)).save(paths[-1])
    row = Preference(
        id="p", question="Which digit?", responses=("It is seven.", "Look: <image>"), label=2,
        image_paths=tuple(paths[:2]), response_images=(0, 1),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    builder = PromptBuilder(tokenizer, 4096, template=POINTWISE_TEMPLATE)
    first, second = (builder.build(row, swapped=swapped) for swapped in (False, True))
    assert (first.label, first.image_paths, second.label, second.image_paths) == (2, (paths[0],), 1, tuple(paths[:2]))
    texts = [tokenizer.decode(one.token_ids) for one in (first, second)]
    assert ["It is seven." in text for text in texts] == [True, False]
    assert ["Look:" in text for text in texts] == [False, True]
    assert first.id != second.id
    limits = RowLimits(model=tiny_folder, prompt_tokens=4096, sequence_tokens=None, sequence_key="", response_tokens=1,
                       min_pixels=3136, max_pixels=40_000, folders=None, template=POINTWISE_TEMPLATE)  # fmt: skip
    assert limits.prompt_length(row) == max(len(one.token_ids) for one in (first, second))
    assert limits.preference(row) == ""


def test_the_kind_is_the_run_files_or_the_folders(tmp_path: Path) -> None:
    assert (kind_of(config_of(tmp_path)), template_of(config_of(tmp_path))) == ("generative", TEMPLATE)
    assert (kind_of(pointwise(tmp_path)), template_of(pointwise(tmp_path))) == ("pointwise", POINTWISE_TEMPLATE)
    own = POINTWISE_TEMPLATE.replace("Start", "Begin")
    (tmp_path / FILE).write_text(PromptPolicy(kind="pointwise", template=own, orders="any").to_json())
    assert (kind_of(config_of(tmp_path)), template_of(config_of(tmp_path))) == ("pointwise", own)
    assert template_of(config_of(tmp_path, prompt={"kind": "generative"})) == TEMPLATE, (
        "another kind is asked otherwise"
    )
    said = rl_policy(pointwise(tmp_path), rows=3)
    assert (said.kind, said.template, said.orders, said.reads_one_response) == ("pointwise", own, "any", True)
    with pytest.raises(ValueError, match=r"rates one: set it to 'pointwise', or prompt.kind to 'generative'"):
        check_settings(config_of(tmp_path), "rl")


def test_what_ratings_cannot_give_is_refused(tmp_path: Path) -> None:
    for changed, match in (
        ({"reward": {"use_judge": True}}, "reward.use_judge asks whether .* samples ratings: set it to false"),
        ({"algorithm": {"samples_per_prompt": 1, "baseline": "group_mean"}}, "which tells a baseline .* nothing"),
        ({"algorithm": {"samples_per_prompt": 1}, "rl": {"dynamic_sampling_rounds": 1}}, "set it above 1"),
        ({"reward": {"agreement_weight": 0.5}}, "term 'agreement' compares the two orders"),
        ({"data": {"swap": "never"}}, "data.swap 'never' shows one order, and rl.pairing 'pointwise' shows both"),
        ({"prompt": {"kind": "generative"}}, "'pointwise' rates responses, prompt.kind 'generative' compares"),
        ({"rl": {"rollout_batch_size": 3, "train_batch_size": 3}}, "'pointwise' asks two prompts about a pair"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            pointwise(tmp_path, **changed)
    pointwise(tmp_path, algorithm={"samples_per_prompt": 1})  # StableReinforce compares with the batch
    with pytest.raises(ValueError, match=r"prompt.parser 'boxed': it reads verdicts about pairs"):
        reader_of(pointwise(tmp_path, prompt={"parser": "boxed"}))
    (tmp_path / "pair.txt").write_text(TEMPLATE)
    with pytest.raises(ValueError, match=r"a template holds each of \{question\}, \{answer\} once"):
        template_of(pointwise(tmp_path, prompt={"template": tmp_path / "pair.txt"}))


def test_rows_with_a_rating_are_the_cold_start(tmp_path: Path) -> None:
    row = {"id": "a", "question": "Which digit?", "candidate": "It is 7.", "rating": 9, "reasoning": "I see 7."}
    bad = [row | {"id": "b", "rating": 11}, row | {"id": "c", "reasoning": " "}, row | {"id": "d", "rating": 7.5}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [row, *bad]))
    found = read_sft_examples(path, rated=POINTWISE_TEMPLATE, quarantine=tmp_path / "q.jsonl")
    (example,) = found.examples
    assert example.response == "<think>I see 7.</think><answer>9</answer>"
    (turn,) = example.messages
    (part,) = turn["content"]
    assert part["text"] == POINTWISE_TEMPLATE.format(question="Which digit?", answer="It is 7.")
    assert is_filled(part["text"], POINTWISE_TEMPLATE)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert reasons == [
        "rating is 11, not a whole number from 1 to 10", "reasoning is empty",
        "rating is 7.5, not a whole number from 1 to 10",
    ]  # fmt: skip
    policy = sft_policy(pointwise(tmp_path), [example], steps=1)
    assert policy is not None and (policy.kind, policy.orders) == ("pointwise", "any")
    with pytest.raises(ValueError, match=r"a pointwise model learns: set prompt.kind = 'pointwise'"):
        read_sft_examples(path, quarantine=tmp_path / "q.jsonl")


@pytest.mark.slow
def test_the_trainer_takes_steps_on_ratings(tiny_folder: Path, image_paths: tuple[str, ...], tmp_path: Path) -> None:
    """From a record whose texts are ratings, groups of two responses: micro-batches change rounding only (which Adam's
    first steps enlarge), and the folder says what it has become."""
    rl_keys = {"pairing": "pointwise", "steps": 2, "rollout_batch_size": 4, "train_batch_size": 2}
    config = replay_config(
        tmp_path / "whole", tiny_folder, rl=rl_keys | {"replay": tmp_path / "record"}, reward={"use_judge": False},
        algorithm={"method": "grpo", "samples_per_prompt": 2, "mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0},
    )  # fmt: skip
    assert config.rl.replay is not None
    image = load_hf_config(tiny_folder).image_token_id
    recorder = Recorder(config.rl.replay, origin_of(config, {"made": "up"}), resumed_step=None)
    scorer = RewardScorer(config.reward, None, pointwise=True)
    made_up = replay_config(tmp_path, tiny_folder, rl=rl_keys | {"replay": tmp_path / "other"},
                            reward={"use_judge": False}, algorithm={"samples_per_prompt": 2})  # fmt: skip
    for batch in write_made_up_record(made_up, image_paths, image_token_id=image):
        rollouts = []
        for place, item in enumerate(batch.scored):
            pair, swapped = divmod(place // 2, 2)
            prompt = replace(item.rollout.prompt, group=f"{pair}", swapped=bool(swapped), label=2 if swapped else 1)
            said = f"<think>x</think><answer>{(9, 4, 5, 2)[place % 4]}</answer>"
            rollouts.append(replace(item.rollout, prompt=prompt, text=said))
        scored, counts = scorer.score(rollouts)
        assert [one.result_reward for one in scored] == [1.0, 0.5, 0.5, 1.0] * 2
        recorder.write(replace(batch, scored=tuple(scored), counts=counts))
    topology = setup.initialize(ParallelSection(), seed=0)
    try:
        small = elsewhere(config, tmp_path / "small", data={"token_budget": 120})
        folders = [rl.run(one, topology, None) for one in (config, small)]
    finally:
        setup.shutdown()
    metrics = [
        [json.loads(line) for line in (one.run.output_dir / "metrics.jsonl").read_text().splitlines()]
        for one in (config, small)
    ]
    for whole, parts, tolerance in zip(*metrics, (1e-4, 1e-2), strict=True):
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=tolerance) and whole["grad_norm"] > 0
        assert (whole["rating/mean"], whole["reward/result"]) == (5.0, 0.75)
    assert folders[0] is not None
    policy = read_policy(folders[0])
    assert policy is not None and (policy.kind, policy.stages[-1].settings["response_order"]) == (
        "pointwise", "one at a time",
    )  # fmt: skip
