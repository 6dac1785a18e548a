"""The sampled texts are scripted, so that every number of the result is known; the rest is the real thing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.evaluation.control_sets import shuffle_images
from megatron_r1reward.evaluation.evaluate import evaluate
from megatron_r1reward.evaluation.result import EvaluationResult
from megatron_r1reward.types import Label, Preference, Prompt, Rollout

BANNED, CUT = "<|image_pad|>", " and and"
Script = Callable[[Prompt, int], str | None]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    rollouts: tuple[Rollout, ...]
    quarantined: tuple[Rollout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScriptedPool:
    """Answers a prompt's sample with `script(prompt, index)`; None is a response that never came. Those that hold
    BANNED are quarantined; `temperatures` are those that were asked for."""

    script: Script
    temperatures: list[float] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSection, *, n: int, seed: int, progress: Any = None
    ) -> Sampled:
        self.temperatures.append(sampling.temperature)
        texts = [(prompt, index, self.script(prompt, index)) for prompt in prompts for index in range(n)]
        rollouts = [_rollout(prompt, index, text) for prompt, index, text in texts if text]
        return Sampled(
            rollouts=tuple(rollout for rollout in rollouts if BANNED not in rollout.text),
            quarantined=tuple(rollout for rollout in rollouts if BANNED in rollout.text),
        )


def _rollout(prompt: Prompt, index: int, text: str) -> Rollout:
    length = len(text.split())
    return Rollout(
        prompt=prompt,
        sample_index=index,
        token_ids=(1,) * length,
        log_probs=(-1.0,) * length,
        text=text,
        finish_reason="length" if text.endswith(CUT) else "stop",
        weight_spans=(),
    )


def says(answer: object) -> str:
    return f"<think>The image shows 7.</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def builder(tiny_folder: Path) -> PromptBuilder:
    return PromptBuilder(AutoTokenizer.from_pretrained(tiny_folder), 4096)


def pairs(count: int, folder: Path, *, images: int | None = None) -> list[Preference]:
    """`count` pairs over `images` different pictures of equal size; labels alternate, categories too."""
    found = []
    for index in range(count):
        path = folder / f"{index % (images or count)}.png"
        if not path.exists():
            Image.new("RGB", (56, 56), (index, 0, 0)).save(path)
        found.append(
            Preference(
                id=f"pair-{index}",
                question="Which digit is shown?",
                responses=("It is 7.", "It is 3."),
                label=1 if index % 2 else 2,
                image_paths=(str(path),),
                metadata={"category": ("digit", "parity", "sum")[index % 3]},
            )
        )
    return found


def run(preferences: Sequence[Preference], builder: PromptBuilder, script: Script, **changes: Any) -> EvaluationResult:
    options: dict[str, Any] = {"samples": 3, "voting": (1, 3), "seed": 0, **changes}
    return evaluate(preferences, ScriptedPool(script=script), builder, SamplingSection(), **options)


def wrong(label: Label) -> Label:
    return 2 if label == 1 else 1


def test_a_model_that_always_says_1_scores_one_half_not_everything(builder: PromptBuilder, tmp_path: Path) -> None:
    result = run(pairs(12, tmp_path), builder, lambda prompt, index: says(1))
    assert result.accuracy == 0.5
    assert result.interval[1] - result.interval[0] < 0.15  # each pair is right in one order, wrong in the other
    assert result.accuracy_by_order["12"] == result.accuracy_by_order["21"] == 0.5
    assert result.order_consistency == 0.0
    assert result.voting["3"] == 0.5
    assert result.answer_1_rate == 1.0


def test_a_perfect_judge(builder: PromptBuilder, tmp_path: Path) -> None:
    result = run(pairs(12, tmp_path), builder, lambda prompt, index: says(prompt.label))
    assert result.accuracy == result.order_consistency == result.voting["3"] == 1.0
    assert result.format_rate == 1.0
    assert result.unparsable_rate == 0.0
    assert result.answer_1_rate == 0.5
    assert result.counts.pairs == 12
    assert result.counts.samples == 12 * 2 * 3
    assert {name: found.pairs for name, found in result.by_category.items()} == {"digit": 4, "parity": 4, "sum": 4}


def test_votes_are_replayed_on_the_samples_of_both_orders(builder: PromptBuilder, tmp_path: Path) -> None:
    """A perfect judge needs two samples; one that always says 1 is a tie in both orders; the control has none."""
    found = [run(pairs(6, tmp_path), builder, lambda prompt, index: says(prompt.label)).vote_budget]
    found.append(run(pairs(6, tmp_path), builder, lambda prompt, index: says(1)).vote_budget)
    assert found[0] is not None and found[1] is not None
    assert {point.accuracy for point in found[0].points} == {1.0}
    assert found[0].cheapest is not None and found[0].cheapest.samples == 2
    tokens = {point.setting: point.tokens for point in found[0].points}
    assert tokens["voting@3"] == 3 * len(says(1).split()) and tokens["1 + 1"] == 2 * len(says(1).split())
    assert {point.accuracy for point in found[1].points if point.method != "one order"} == {0.5}
    assert run(pairs(6, tmp_path), builder, lambda prompt, index: says(1), shuffle_images=True).vote_budget is None


def test_one_right_one_wrong_one_unparsable(builder: PromptBuilder, tmp_path: Path) -> None:
    def script(prompt: Prompt, index: int) -> str:
        return [says(prompt.label), says(wrong(prompt.label)), "no tags at all"][index]

    result = run(pairs(4, tmp_path), builder, script)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.voting["3"] == 0.5  # one vote each
    assert result.any_correct["3"] == 1.0
    assert result.any_correct["1"] == pytest.approx(1 / 3)
    assert result.unparsable_rate == pytest.approx(1 / 3)
    assert result.format_rate == pytest.approx(2 / 3)
    assert result.order_consistency == 0.5  # two coins


def test_pairs_that_no_server_answered_are_left_out_and_counted(builder: PromptBuilder, tmp_path: Path) -> None:
    def script(prompt: Prompt, index: int) -> str | None:
        return None if prompt.preference_id == "pair-0" and prompt.swapped else says(prompt.label)

    result = run(pairs(5, tmp_path), builder, script)
    assert (result.counts.pairs, result.counts.failed, result.accuracy) == (4, 1, 1.0)
    with pytest.raises(ValueError, match="none of 5 pairs was answered in both orders"):
        run(pairs(5, tmp_path), builder, lambda prompt, index: None)


def test_quarantined_responses_stay_in_the_denominator(builder: PromptBuilder, tmp_path: Path) -> None:
    """Of ten pairs five hold nothing but refused responses in one order: they are answers, and not right ones."""

    def script(prompt: Prompt, index: int) -> str:
        refused = prompt.swapped and int(prompt.preference_id.removeprefix("pair-")) < 5
        return says(prompt.label) + BANNED * refused

    result = run(pairs(10, tmp_path), builder, script, transcripts=10)
    assert (result.counts.pairs, result.counts.failed, result.counts.quarantined) == (10, 0, 15)
    assert result.accuracy == 0.75
    assert result.accuracy_by_order == {"12": 1.0, "21": 0.5}
    assert result.unparsable_rate == 0.25
    assert len(result.transcripts) < 10, "a refused response is not shown"


def test_a_response_that_was_cut_off_is_counted_and_not_well_formed(builder: PromptBuilder, tmp_path: Path) -> None:
    result = run(pairs(4, tmp_path), builder, lambda prompt, index: says(prompt.label) + CUT * (index == 0))
    assert (result.counts.truncated, result.accuracy) == (8, 1.0)
    assert result.format_rate == pytest.approx(2 / 3)


def test_greedy_accuracy_stands_beside_the_sampled_one(builder: PromptBuilder, tmp_path: Path) -> None:
    pool = ScriptedPool(script=lambda prompt, index: says(prompt.label if pool.temperatures[-1] == 0 else 1))
    options: dict[str, Any] = {"samples": 3, "voting": (1,), "seed": 0}
    result = evaluate(pairs(12, tmp_path), pool, builder, SamplingSection(temperature=0.9), greedy=True, **options)
    assert pool.temperatures == [0.9, 0.0]
    assert result.greedy is not None
    assert (result.accuracy, result.greedy.accuracy) == (0.5, 1.0)
    assert (result.greedy.counts.samples, result.greedy.order_consistency) == (24, 1.0)
    assert result.greedy.interval[0] > 0.7
    assert run(pairs(4, tmp_path), builder, lambda prompt, index: says(1)).greedy is None


def test_pairs_about_the_same_picture_are_one_item(builder: PromptBuilder, tmp_path: Path) -> None:
    def script(prompt: Prompt, index: int) -> str:
        odd = int(Path(prompt.image_paths[0]).stem) % 4 == 0
        return says(wrong(prompt.label) if odd else prompt.label)

    alone = run(pairs(40, tmp_path), builder, script)
    together = run(pairs(40, tmp_path, images=8), builder, script)
    assert alone.accuracy == together.accuracy == 0.75
    assert together.interval[1] - together.interval[0] > 1.5 * (alone.interval[1] - alone.interval[0])


def test_bad_requests_are_refused(builder: PromptBuilder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation.voting \[5\] is not within 1 and evaluation.samples 3"):
        run(pairs(2, tmp_path), builder, lambda prompt, index: says(1), voting=(1, 5))
    with pytest.raises(ValueError, match=r"'pair-0'.*unique"):
        run(pairs(1, tmp_path) * 2, builder, lambda prompt, index: says(1))


def test_transcripts_show_what_the_model_saw_and_are_the_same_pairs_for_every_model(
    builder: PromptBuilder, tmp_path: Path
) -> None:
    preferences = pairs(12, tmp_path)
    good = run(preferences, builder, lambda prompt, index: says(prompt.label)).transcripts
    bad = run(preferences, builder, lambda prompt, index: says(wrong(prompt.label))).transcripts
    assert [(entry.preference_id, entry.order) for entry in good] == [(e.preference_id, e.order) for e in bad]
    assert {entry.category for entry in good} == {"digit", "parity", "sum"}
    assert {entry.order for entry in good} == {"12", "21"}
    assert all(entry.correct for entry in good)
    assert not any(entry.correct for entry in bad)
    for entry in good:
        stored = next(pair for pair in preferences if pair.id == entry.preference_id)
        assert entry.responses[entry.label - 1] == stored.responses[stored.label - 1]
        assert (entry.responses == stored.responses) == (entry.order == "12")


def test_json_holds_every_figure_with_its_interval(builder: PromptBuilder, tmp_path: Path) -> None:
    result = run(pairs(6, tmp_path), builder, lambda prompt, index: says(1 if index else prompt.label))
    found = json.loads(result.to_json())
    assert found["accuracy"] == found["voting"]["1"] == pytest.approx(4 / 6)
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
    assert set(found["voting"]) == set(found["voting_intervals"]) == set(found["any_correct"]) == {"1", "3"}
    assert set(found["accuracy_by_order"]) == set(found["accuracy_by_order_intervals"]) == {"12", "21"}
    assert found["counts"]["pairs"] == 6
    assert found["transcripts"][0]["correct"] in {True, False}
    assert EvaluationResult.model_validate(found) == result
    unparsable = run(pairs(6, tmp_path), builder, lambda prompt, index: "?")
    assert (unparsable.answer_1_rate, unparsable.unparsable_rate) == (None, 1.0)


def test_control_gives_a_model_that_looks_nothing_to_see(builder: PromptBuilder, tmp_path: Path) -> None:
    """This judge knows the right answer of every picture: with another picture it is right half of the time."""
    preferences = pairs(40, tmp_path)
    right = {pair.image_paths[0]: pair.responses[pair.label - 1] for pair in preferences}

    def looks(prompt: Prompt, index: int) -> str:
        seen_first = right[prompt.image_paths[0]] == "It is 7."
        return says(1 if seen_first != prompt.swapped else 2)

    assert run(preferences, builder, looks).accuracy == 1.0
    control = run(preferences, builder, looks, shuffle_images=True)
    assert control.shuffled_images
    assert control.accuracy == pytest.approx(0.5, abs=0.25)
    assert control.counts.pairs == 40


def test_shuffled_images_are_never_the_own_ones_and_keep_their_sizes(tmp_path: Path) -> None:
    preferences = pairs(30, tmp_path, images=4)
    for index in (0, 7):  # two pairs with images of a size of their own, one with a size that nobody else has
        wide = tmp_path / f"wide-{index}.png"
        Image.new("RGB", (112, 56), (index, 9, 9)).save(wide)
        preferences[index] = dataclasses.replace(preferences[index], image_paths=(str(wide),))
    odd = tmp_path / "odd.png"
    Image.new("RGB", (28, 28)).save(odd)
    preferences[3] = dataclasses.replace(preferences[3], image_paths=(str(odd),))

    shuffled = shuffle_images(preferences, seed=3)
    own = {pair.id: pair for pair in preferences}
    assert [pair.id for pair in shuffled] == [pair.id for pair in preferences if pair.id != "pair-3"]
    for pair in shuffled:
        assert pair.image_paths != own[pair.id].image_paths
        assert Image.open(pair.image_paths[0]).size == Image.open(own[pair.id].image_paths[0]).size
        assert dataclasses.replace(pair, image_paths=own[pair.id].image_paths) == own[pair.id]
    assert shuffle_images(preferences, seed=3) == shuffled
    assert shuffle_images(preferences, seed=4) != shuffled


def test_a_picture_that_most_pairs_share_leaves_some_without_a_partner(tmp_path: Path) -> None:
    preferences = [*pairs(8, tmp_path, images=1), *pairs(10, tmp_path)[8:]]
    shuffled = shuffle_images(preferences, seed=0)
    assert len(shuffled) == 4  # two pairs have another picture, so two of the eight can get it, and they get theirs
    own = {pair.id: pair.image_paths for pair in preferences}
    assert all(pair.image_paths != own[pair.id] for pair in shuffled)
    with pytest.raises(ValueError, match="control needs images of equal size"):
        shuffle_images(pairs(3, tmp_path, images=1), seed=0)
