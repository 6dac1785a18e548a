"""Rollouts to rewards, with the judge asked only where it counts."""

from dataclasses import replace

import pytest
from scripted_server import ScriptedServer
from waiting import wait_until

from megatron_r1reward.config.schema import JudgeSection, RewardSection
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.types import Label, Prompt, Rollout

NO_JUDGE = RewardSection(use_judge=False)


def rollout(text: str, label: Label = 1) -> Rollout:
    prompt = Prompt(id="p/12/0", preference_id="p", token_ids=(1,), image_paths=(), label=label, swapped=False)
    return Rollout(
        prompt=prompt,
        sample_index=0,
        token_ids=(1,),
        log_probs=(0.0,),
        text=text,
        finish_reason="stop",
        weight_spans=(),
    )


ROLLOUTS = [
    rollout("<think>case a</think><answer>1</answer>"),  # right, well formed
    rollout("<think>case b</think><answer>2</answer>"),  # wrong, well formed
    rollout("case c <answer>2</answer>", label=2),  # right, malformed
    rollout("I think that Response 1 is better: 1"),  # unparsable
]


def test_without_a_judge() -> None:
    scored, counts = RewardScorer(NO_JUDGE, None).score(ROLLOUTS)
    assert [s.reward for s in scored] == [1.5, 0.5, 1.0, 0.0]
    assert [s.predicted for s in scored] == [1, 2, 2, None]
    assert {s.verdict for s in scored} == {"not_asked"}
    assert counts == {
        "judge_asked": 0,
        "judge_consistent": 0,
        "judge_inconsistent": 0,
        "judge_unknown": 0,
        "unparsable": 1,
        "truncated": 0,
        "special_tokens": 0,
        "masked": 0,
        "answer_1": 1,
        "unlabelled": 0,
        "judge_cached": 0,
        "judge_over_budget": 0,
        "judge_not_tried": 0,
        "judge_steps_without": 0,
    }


def test_the_judge_is_asked_only_where_the_result_is_right(serve) -> None:
    server = serve("1", "0")
    judge = ConsistencyJudge(JudgeSection(max_concurrency=1), [server.url])
    scored, counts = RewardScorer(RewardSection(), judge).score(ROLLOUTS)
    assert [s.verdict for s in scored] == ["consistent", "not_asked", "inconsistent", "not_asked"]
    assert [s.reward for s in scored] == [2.0, 0.5, 1.0, 0.0]
    assert [s.rollout for s in scored] == ROLLOUTS
    assert len(server.requests) == 2
    assert (counts["judge_asked"], counts["judge_consistent"], counts["judge_inconsistent"]) == (2, 1, 1)


def test_released_levels_punish_inconsistency(serve) -> None:
    judge = ConsistencyJudge(JudgeSection(), [serve("0").url])
    scored, _ = RewardScorer(RewardSection(consistency_levels="released_code"), judge).score(ROLLOUTS)
    assert [s.consistency_reward for s in scored] == [-1.0, 0.0, -1.0, 0.0]
    assert [s.reward for s in scored] == [1.0, 0.5, 0.5, 0.0]


def test_a_failing_judge_costs_the_bonus_only_and_is_counted(serve) -> None:
    judge = ConsistencyJudge(JudgeSection(retries=0), [serve(500).url])
    scorer = RewardScorer(RewardSection(), judge)
    for _ in range(2):  # one scorer serves all steps of a run
        scored, counts = scorer.score(ROLLOUTS)
        assert [s.reward for s in scored] == [1.5, 0.5, 1.0, 0.0]
        assert counts["judge_unknown"] == 2


def test_no_rollouts() -> None:
    scored, counts = RewardScorer(NO_JUDGE, None).score([])
    assert scored == []
    assert set(counts.values()) == {0}


def test_a_missing_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"reward\.use_judge is true"):
        RewardScorer(RewardSection(), None)


def answers(count: int, *, per_slot: int = 2) -> list[list[Rollout]]:
    """Slots of right and wrong answers with reasonings of their own."""
    return [
        [rollout(f"<think>case {slot} {i}</think><answer>{1 + (slot + i) % 2}</answer>") for i in range(per_slot)]
        for slot in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 1, 3), (1,)])
def test_the_order_of_arrival_changes_nothing(serve, budget: int | None, order: tuple[int, ...]) -> None:
    """Neither rewards, nor their order, nor which questions are asked where there is a budget."""

    def scorer() -> tuple[RewardScorer, ScriptedServer]:
        server = serve("1")
        judge = ConsistencyJudge(JudgeSection(max_calls_per_step=budget), [server.url])
        return RewardScorer(RewardSection(), judge), server

    slots = answers(5)
    rollouts = [one for slot in slots for one in slot]
    at_once, asked_at_once = scorer()
    expected = at_once.score(rollouts)
    assert expected[1]["judge_over_budget"] == (2 if budget else 0)
    one_by_one, asked = scorer()
    with one_by_one.begin() as batch:
        for slot in order:
            batch.add(slot, slots[slot])
        assert batch.finish(rollouts) == expected
    assert {str(r) for r in asked.requests} == {str(r) for r in asked_at_once.requests}


def test_without_a_budget_a_question_waits_for_nobody(serve) -> None:
    server = serve("1")
    server.chat.close()
    scorer = RewardScorer(RewardSection(), ConsistencyJudge(JudgeSection(), [server.url]))
    with scorer.begin() as batch:
        batch.add(3, answers(4)[3])
        wait_until(lambda: server.chat.inside == 1)
        server.chat.open()


def test_batches_under_way_at_the_same_time_are_counted_apart(serve) -> None:
    server = serve("1")
    scorer = RewardScorer(RewardSection(), ConsistencyJudge(JudgeSection(), [server.url]))
    slots = answers(4)
    with scorer.begin() as first, scorer.begin() as second:
        first.add(0, slots[0])
        second.add(0, slots[1])
        assert second.finish([*slots[1], *slots[2]])[1]["judge_asked"] == 2
        assert first.finish(slots[0])[1]["judge_asked"] == 1


CUT = replace(rollout("<think>a</think><answer>1</answer> and and"), finish_reason="length")


@pytest.mark.parametrize(
    ("truncated", "reward", "predicted", "masked"),
    [("penalise", 0.0, None, False), ("mask", 0.0, None, True), ("as_is", 1.0, 1, False)],
)
def test_a_response_that_did_not_end(truncated: str, reward: float, predicted: int | None, masked: bool) -> None:
    section = RewardSection(use_judge=False, truncated=truncated)
    (scored,), counts = RewardScorer(section, None).score([CUT])
    assert (scored.reward, scored.predicted, scored.masked) == (reward, predicted, masked)
    assert (counts["truncated"], counts["masked"], counts["unparsable"]) == (1, masked, predicted is None)
    whole = replace(rollout("<think>a</think><answer>1</answer>"), finish_reason="length")
    assert RewardScorer(RewardSection(use_judge=False), None).score([whole])[0][0].reward == 0.0, "by default"


def test_special_tokens_inside_are_not_well_formed() -> None:
    """Decoding leaves them out: the text alone looks as it should."""
    noisy = replace(rollout("<think>a</think><answer>1</answer>"), special_tokens=True)
    (scored,), counts = RewardScorer(NO_JUDGE, None).score([noisy])
    assert (scored.format_reward, scored.result_reward, counts["special_tokens"]) == (0.0, 1.0, 1)
