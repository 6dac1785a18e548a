"""Pairs without a better response are made of the data, and show a taste for a place that the data cannot show."""

from __future__ import annotations

from pathlib import Path

from test_evaluate import ScriptedPool, builder, pairs, says  # noqa: F401  (builder is a fixture)

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.evaluation.control_sets import NEAR, SAME, WRONG, make_pair_kinds
from megatron_r1reward.evaluation.evaluate import evaluate
from megatron_r1reward.types import Preference, Prompt


def preference(number: int, right: str, wrong: str, image: str, question: str = "Which digit?") -> Preference:
    responses = (right, wrong) if number % 2 else (wrong, right)
    return Preference(
        id=f"p{number}", question=question, responses=responses, label=1 if number % 2 else 2, image_paths=(image,)
    )


def test_wrong_pairs_are_rejected_responses_of_the_item_or_answers_that_share_no_telling_word() -> None:
    data = [
        preference(0, "It is 7.", "It is 3.", "a.png"),
        preference(1, "It is 5.", "The image shows 7.", "b.png"),  # 7 in other words: it is right for a.png
        preference(2, "a cat", "a dog", "c.png", "What?"),
        preference(3, "a cat", "a cow", "c.png", "What?"),
        preference(4, "yes", "no", "d.png", "Alone?"),
    ]
    made = {frozenset(pair.responses): pair for pair in make_pair_kinds(data, 9, 0)[WRONG]}
    assert set(made) == {frozenset({"It is 3.", "It is 5."}), frozenset({"a dog", "a cow"})}
    assert made[frozenset({"a dog", "a cow"})].image_paths == ("c.png",)


def test_kinds_are_drawn_by_the_seed_and_limited(tmp_path: Path) -> None:
    data = pairs(12, tmp_path)
    made = make_pair_kinds(data, 5, 0)
    assert made == make_pair_kinds(data, 5, 0) != make_pair_kinds(data, 5, 1)
    assert [len(made[NEAR]), len(made[SAME])] == [5, 5]
    assert {pair.responses for pair in made[NEAR]} <= {("It is 7.", "It is 7"), ("It is 3.", "It is 3")}
    assert all(first == second for first, second in (pair.responses for pair in made[SAME]))
    assert make_pair_kinds(data, 0, 0) == {}


def test_a_judge_that_is_perfect_on_the_data_but_says_1_elsewhere_is_seen(
    builder: PromptBuilder,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The demo's RL model in the small: it agrees with itself where an answer is right, and says 1 where none is."""
    data = pairs(12, tmp_path)
    extra = make_pair_kinds(data, 8, 0)

    def script(prompt: Prompt, index: int) -> str:
        made = any(kind in prompt.preference_id for kind in (WRONG, NEAR, SAME))
        return says(1 if made else prompt.label)

    pool = ScriptedPool(script=script)
    found = evaluate(data, pool, builder, SamplingSection(), samples=3, voting=(1,), seed=0, greedy=True, extra=extra)
    assert found.order_consistency == 1.0
    kinds = {kind.kind: kind for kind in found.pair_kinds}
    assert pool.temperatures == [1.0, 0.0, 0.0]
    right, near, same = kinds["right against wrong"], kinds[NEAR], kinds[SAME]
    assert (right.pairs, right.first_place, right.order_agreement) == (12, 0.5, 1.0)
    assert (near.pairs, near.first_place, near.order_agreement) == (8, 1.0, 0.0)
    assert (same.first_place, same.order_agreement) == (1.0, None)
    assert near.order_agreement_interval is not None
    assert near.order_agreement_interval[1] < right.order_agreement_interval[0]  # type: ignore[index]
    assert found.counts.pairs == 12, "the main figures are of the data alone"


def test_what_is_too_long_or_says_nothing_is_left_out(builder: PromptBuilder, tmp_path: Path) -> None:  # noqa: F811
    data = pairs(2, tmp_path)
    long = Preference(
        id="long", question="q", responses=("word " * 9000, "b"), label=1, image_paths=data[0].image_paths, metadata={}
    )
    found = evaluate(
        data,
        ScriptedPool(script=lambda prompt, index: "no tags"),
        builder,
        SamplingSection(),
        samples=1,
        voting=(1,),
        seed=0,
        extra={NEAR: [*make_pair_kinds(data, 1, 0)[NEAR], long]},
    )
    (near,) = found.pair_kinds
    assert (near.pairs, near.first_place, near.order_agreement) == (1, None, 0.0)
