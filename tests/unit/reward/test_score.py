"""Rollouts to rewards, with the judge asked only where it counts."""

import pytest

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
        "answer_1": 1,
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
