"""The consistency judge of votes: what it is shown, how often it is asked, and what its silence means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from scripted_server import ScriptedServer
from test_evaluate import builder, pairs, run, wrong  # noqa: F401  (builder is a fixture)

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.evaluation.judged_votes import Case, VoteJudge, ask_judge
from megatron_r1reward.evaluation.result import JudgedSamples
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeDownError
from megatron_r1reward.types import JudgeVerdict, Prompt


class Asked:
    """Answers so many questions, then is gone."""

    def __init__(self, *, answers: int) -> None:
        self.left = answers
        self.batches: list[int] = []

    async def judge_many(self, cases: Sequence[Case]) -> list[JudgeVerdict]:
        self.batches.append(len(cases))
        if not self.left:
            raise JudgeDownError("the judge gave no verdict")
        known, self.left = min(self.left, len(cases)), max(0, self.left - len(cases))
        return ["consistent"] * known + ["unknown"] * (len(cases) - known)


def test_questions_go_out_in_pieces_whose_answers_are_kept() -> None:
    judge = Asked(answers=10_000)
    said, found = ask_judge(VoteJudge(judge=judge, name="j"), [(f"reason {i % 1000}", 1) for i in range(3000)])
    assert (sum(judge.batches), max(judge.batches)) == (1000, 512)
    assert said == [True] * 3000
    assert found == JudgedSamples(judge="j", consistent=3000, inconsistent=0, unknown=0)


@pytest.mark.parametrize(("answers", "missing"), [(0, 1000), (700, 300), (880, 120)])
def test_a_judge_that_is_gone_leaves_a_reason_and_no_votes(answers: int, missing: int) -> None:
    """Silence is no consent: votes of everybody must not stand there as judge-filtered ones."""
    said, found = ask_judge(VoteJudge(judge=Asked(answers=answers), name="j"), [(str(i), 1) for i in range(1000)])
    assert said.count(None) == missing
    assert found == f"judge j gave no verdict on {missing} of 1000 samples: see the log, and run again"


def test_a_few_questions_without_an_answer_are_counted() -> None:
    _, found = ask_judge(VoteJudge(judge=Asked(answers=95), name="j"), [(str(i), 1) for i in range(100)])
    assert found == JudgedSamples(judge="j", consistent=95, inconsistent=0, unknown=5)


class SeeingJudge(ScriptedServer):
    def _take(self, body: dict) -> str:
        super()._take(body)
        return "0" if "contradiction" in str(body["messages"]) else "1"


def test_an_evaluation_asks_about_the_response_that_the_model_saw(builder, tmp_path: Path) -> None:  # noqa: F811
    """Two of three samples are wrong, with a reasoning that speaks against them; the judge is a server."""

    def script(prompt: Prompt, index: int) -> str:
        answer = prompt.label if index == 0 else wrong(prompt.label)
        reason = f"Response {answer} it is." if index == 0 else f"A contradiction to Response {answer}."
        return f"<think>{reason}</think><answer>{answer}</answer>"

    server = SeeingJudge([""])
    try:
        judge = ConsistencyJudge(JudgeSection(), [server.url])
        result = run(pairs(4, tmp_path), builder, script, judge=VoteJudge(judge=judge, name="a server"))
    finally:
        server.stop()
    shown = [str(request["messages"]) for request in server.requests]
    assert len(shown) == 4
    for answer in (1, 2):
        asked = [text for text in shown if f"Response {answer} is better." in text]
        assert len(asked) == 2 and all(f"Response {answer} it is." in a or f"to Response {answer}." in a for a in asked)
    budget = result.vote_budget
    assert budget is not None
    assert budget.judged == JudgedSamples(judge="a server", consistent=8, inconsistent=16, unknown=0)
    accuracy = {(point.method, point.setting): point.accuracy for point in budget.points}
    assert accuracy["both orders, judge-filtered", "3 + 3"] == 1.0
    assert accuracy["both orders", "3 + 3"] == 0.0
    unasked = run(pairs(4, tmp_path), builder, script, judge="evaluation.judge_filtered_votes is false").vote_budget
    assert unasked is not None and unasked.not_judged == "evaluation.judge_filtered_votes is false"
