"""A scalar reward model in use: what follows from one number per response, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from running_service import Running

from megatron_r1reward.evaluation.scalar_evaluation import ABSENT, evaluate_scalar
from megatron_r1reward.judging.ask import AskOptions, Item, ModelUnavailableError
from megatron_r1reward.judging.compare import Votes, compare
from megatron_r1reward.judging.rank import rank
from megatron_r1reward.judging.rewards import Reward, read_rewards
from megatron_r1reward.judging.served import asked_by, policy_of
from megatron_r1reward.judging.votes import Adaptive
from megatron_r1reward.model_folder.config_reader import CONFIG
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.model_folder.scalar_folder import scalar_config
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.serving.clients import TrlReward
from megatron_r1reward.serving.service import Backend
from megatron_r1reward.types import Preference

ITEM = Item(question="Which?")
VALUES = {"good": 2.5, "fair": 0.5, "bad": -1.5, "equal": 0.5}


class Head:
    """Rewards that are known; "torn" has none."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def reward(self, item: Item, response: str) -> Reward:
        self.calls.append(response)
        if response == "torn":
            raise ModelUnavailableError("no server")
        return Reward(value=VALUES[response], tokens=10)


def test_a_comparison_is_the_sigmoid_of_the_difference() -> None:
    head = Head()
    found = asyncio.run(compare(head, ITEM, ("good", "bad"), Votes()))
    exchanged = asyncio.run(compare(head, ITEM, ("bad", "good"), Votes(both_orders=False, aggregator="majority")))
    assert found.probability == pytest.approx(1 / (1 + math.exp(-4.0)))
    assert (found.verdict, found.orders_agree, exchanged.verdict) == (1, True, 2)
    assert exchanged.probability == pytest.approx(1 - (found.probability or 0))
    assert head.calls == ["good", "bad", "bad", "good"]
    assert (found.counts.first, found.counts.second, found.counts.unparsable, found.tokens) == (1, 0, 0, 0)
    (said,) = found.judgements
    assert json.loads(said.text)["rewards"] == [2.5, -1.5] and read_rewards(said.text) == 1
    tie = asyncio.run(compare(head, ITEM, ("fair", "equal"), Votes()))
    assert (tie.verdict, tie.probability, tie.orders_agree, tie.counts.voters) == (None, 0.5, None, 0)
    assert read_rewards(tie.judgements[0].text) is None
    assert "no verdict" in tie._repr_html_()


def test_n_candidates_are_n_calls() -> None:
    head = Head()
    found = asyncio.run(rank(head, ITEM, ["bad", "good", "fair", "bad", "equal"], Votes(), schedule="all_pairs"))
    assert found.order == (1, 2, 4, 0, 3)
    assert found.rewards == (-1.5, 2.5, 0.5, -1.5, 0.5)
    assert sum(found.strengths) == pytest.approx(0.0)
    assert found.strengths[1] - found.strengths[0] == pytest.approx(4.0)
    assert sorted(head.calls) == ["bad", "equal", "fair", "good"]
    assert (found.calls, found.ties, found.cycles, found.unparsable) == (4, 1, 0, 0)
    assert set(found.comparisons) == {(1, 2), (2, 4), (0, 4)}
    assert found.confidence == pytest.approx(math.exp(2.5) / sum(map(math.exp, VALUES.values())))
    alone = asyncio.run(rank(head, ITEM, ["good"], Votes()))
    assert (alone.rewards, alone.best, alone.confidence, alone.comparisons) == ((2.5,), 0, 1.0, {})
    pair = asyncio.run(rank(head, ITEM, ["bad", "good"], Votes()))
    assert pair.confidence == pytest.approx(1 - (pair.comparisons[0, 1].probability or 0))


@pytest.mark.parametrize("votes", [Votes(samples=3), Votes(temperature=0.7), Votes(adaptive=Adaptive())])
def test_votes_are_refused(votes: Votes) -> None:
    for asked in (compare(Head(), ITEM, ("good", "bad"), votes), rank(Head(), ITEM, ["good", "bad"], votes)):
        with pytest.raises(ValueError, match="votes: a scalar reward model gives each response one number"):
            asyncio.run(asked)


def test_a_budget_and_rounds_are_refused() -> None:
    for option in ({"budget": 4}, {"rounds": 2}):
        with pytest.raises(ValueError, match=r"(budget 4|rounds 2): a scalar reward model compares no pairs"):
            asyncio.run(rank(Head(), ITEM, ["good", "bad"], Votes(), **option))


def test_the_service_and_other_trainers_get_the_same_numbers() -> None:
    """Single samples do not wait for others: their reward is their own."""
    loop = EventLoopThread("head")
    service = Running(backend=Backend(model=Head(), loop=loop), on_failure="raise")
    try:
        ranked = service.post("/v1/rank", {"question": "Which?", "responses": ["bad", "good", "fair"]}).json()
        assert (ranked["kind"], ranked["order"], ranked["calls"]) == ("scalar", [1, 2, 0], 3)
        assert ranked["rewards"] == [-1.5, 2.5, 0.5]
        trl = TrlReward(service.url, images=None)
        assert trl(["Which?"] * 2 + ["And?"], ["good", "bad", "fair"]) == [2.5, -1.5, 0.5]
        compared = service.post("/v1/compare", {"question": "Which?", "responses": ["bad", "good"]}).json()
        assert (compared["verdict"], compared["probability"]) == (2, pytest.approx(1 / (1 + math.exp(4.0))))
        assert service.post("/v1/score", {"question": "Which?", "responses": ["fair"]}).json() == {"rewards": [0.5]}
        refused = service.post("/v1/rank", {"question": "Which?", "responses": ["bad", "good"], "votes": 3})
        assert (refused.status_code, "one number" in refused.json()["error"]) == (422, True)
        assert service.post("/slime", {"prompt": "Which?", "response": "good"}).json() == 2.5
        asked = {"query": ["Which?good", "Which?bad"], "prompts": ["Which?", "Which?"]}
        assert service.post("/openrlhf", asked).json() == {"rewards": [2.5, -1.5]}
    finally:
        service.stop()
    with pytest.raises(ValueError, match='on_failure "neutral": a scalar reward model has no reward of a draw'):
        Running(backend=Backend(model=Head(), loop=loop), on_failure="neutral")
    loop.close()


def test_an_evaluation_counts_right_pairs_and_says_what_it_lacks() -> None:
    made = [("good", "bad", 1, "x"), ("good", "bad", 2, "x"), ("fair", "equal", 1, "y"), ("good", "torn", 1, "y")]
    pairs = [
        Preference(id=str(n), question=f"Which? {n}", responses=(one, two), label=label, image_paths=(),
                   metadata={"category": category})
        for n, (one, two, label, category) in enumerate(made)
    ]  # fmt: skip
    found = evaluate_scalar(Head(), asyncio.run, pairs, seed=0)
    assert (found.kind, found.accuracy, found.order_consistency) == ("scalar", 0.5, 1.0)
    assert found.accuracy_by_order == {"12": 0.5, "21": 0.5}
    assert (found.counts.pairs, found.counts.failed, found.calls, found.tokens) == (3, 1, 6, 60)
    assert {name: one.accuracy for name, one in found.by_category.items()} == {"x": 0.5, "y": 0.5}
    assert found.interval[0] < 0.5 < found.interval[1]
    assert {"voting", "any_correct", "contradiction", "unparsable_rate"} <= set(found.absent) == set(ABSENT["scalar"])
    tree = json.loads(found.to_json())
    assert not set(tree) & set(ABSENT["scalar"])
    with pytest.raises(ValueError, match="none of 1 pairs was scored"):
        evaluate_scalar(Head(), asyncio.run, pairs[3:], seed=0)


def test_a_folder_is_of_the_kind_that_both_of_its_files_say(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / FILE).write_text(PromptPolicy(kind="scalar", template="{question}", orders="any").to_json())
    with pytest.raises(ValueError, match=r'reward_model.json says kind "scalar", and config.json the other one'):
        policy_of(folder)
    (folder / FILE).unlink()
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).unlink()
    (folder / CONFIG).write_text(scalar_config(config, 1))
    policy = policy_of(folder)
    assert policy is not None and (policy.kind, policy.template) == ("scalar", "{question}")
    assert asked_by(policy, AskOptions()).end_of_turn == "<|im_end|>"
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert asked_by(policy_of(folder), AskOptions()).end_of_turn == "<|endoftext|>", "the response ends as in training"
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token, with which a response ends"):
        policy_of(folder)
