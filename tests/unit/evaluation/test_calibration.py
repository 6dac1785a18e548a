"""A calibration is fitted on one half of the items and has to hold on the other; the folder carries it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from simulated_judge import SimulatedJudge
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.prompt import TEMPLATE
from megatron_r1reward.evaluation.calibration import apply_temperature, fit_halves, fit_temperature
from megatron_r1reward.evaluation.result import Counts, EvaluationResult
from megatron_r1reward.evaluation.vote_budget import measure_votes
from megatron_r1reward.judging.ask import ORDERS, Item, Judgement, Order
from megatron_r1reward.judging.compare import Votes, compare
from megatron_r1reward.judging.served import policy_of
from megatron_r1reward.judging.votes import Adaptive
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.reward.rules import answer_probability
from megatron_r1reward.types import Prompt, Rollout

K = 8


def drawn(temperature: float, size: int) -> np.ndarray:
    """Probabilities of the right response by a judge that says p where sigmoid(logit(p) / temperature) is the truth."""
    generator = np.random.default_rng(0)
    first = generator.uniform(0.02, 0.98, size=size)
    is_right = generator.random(size) < apply_temperature(first, temperature)
    return np.where(is_right, first, 1 - first)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_of_a_judge_is_found_and_mends_it_on_items_it_has_not_seen(temperature: float) -> None:
    p_right = drawn(temperature, 20_000)
    assert fit_temperature(p_right) == pytest.approx(temperature, rel=0.08)
    found = fit_halves(p_right[:, None], list(range(20_000)), aggregator="balanced", votes="3", seed=0)
    assert found is not None
    assert found.items + found.measured_items == 20_000
    assert abs(found.items - 10_000) < 500
    assert found.error_after < 0.02
    if temperature != 1.0:
        assert found.error_before > 0.05


def test_pairs_of_one_item_are_in_one_half_and_few_items_fit_nothing() -> None:
    items = [f"item {number // 4}" for number in range(400)]
    found = fit_halves(np.full((400, 2), 0.8), items, aggregator="balanced", votes="3", seed=0)
    assert found is not None and found.items + found.measured_items == 100
    assert fit_halves(np.full((400, 1), np.nan), items, aggregator="balanced", votes="3", seed=0) is None
    assert fit_halves(np.full((40, 1), 0.8), items[:40], aggregator="balanced", votes="3", seed=0) is None


def judged(order: Order, p_right: float, count: int) -> list[Judgement]:
    """A judge whose answer token gives the right response this probability, and who then answers accordingly."""
    choice = 1 if p_right > 0.5 else 2
    made = Judgement(
        order=order, choice=choice, p_first=p_right, text="", reasoning="", tokens=10, finish_reason="stop"
    )  # fmt: skip
    return [made] * count


@pytest.mark.slow
def test_votes_by_log_prob_know_more_than_whole_ones() -> None:
    """One order is nearly sure of the right response, the other leans to the wrong one: whole votes tie."""
    pairs = [{"12": judged("12", 0.95, K), "21": judged("21", 0.45, K)} for _ in range(60)]
    budget = measure_votes(pairs, list(range(60)), voting={}, samples=K, seed=0, greedy=[
        {order: part[:1] for order, part in pair.items()} for pair in pairs
    ])  # type: ignore[arg-type]  # fmt: skip
    accuracy = {(point.method, point.setting): point.accuracy for point in budget.points}
    assert accuracy["both orders", "3 + 3"] == 0.5
    assert accuracy["both orders, by log-prob", "3 + 3"] == 1.0
    assert {(fit.aggregator, fit.votes) for fit in budget.fits} >= {
        ("log_prob", "greedy"),
        ("balanced", "adaptive 0.9"),
    }


def test_the_probability_of_an_answer_is_that_of_its_digit() -> None:
    texts = ["<think>", "1 is best", "</think><answer>", "2", "</answer>", "<|im_end|>"]
    prompt = Prompt(id="p", preference_id="p", token_ids=(1,), image_paths=(), label=1, swapped=False)

    def probability(texts: list[str]) -> float | None:
        rollout = Rollout(
            prompt=prompt, sample_index=0, token_ids=tuple(range(len(texts))),
            log_probs=tuple(np.log([0.5, 0.5, 0.9, 0.8, 1.0, 1.0])[: len(texts)]), text="".join(texts),
            finish_reason="stop", weight_spans=(),
        )  # fmt: skip
        return answer_probability(rollout, texts.__getitem__)

    assert probability(texts) == pytest.approx(0.8)
    assert probability(texts[:3]) is None
    assert probability(["2", "no tag"]) is None


def evaluated(folder: Path, place: Path) -> Path:
    pairs: list[dict[Order, list[Judgement]]] = []
    for p in drawn(0.4, 300):
        pairs.append({order: judged(order, float(p), K) for order in ORDERS})
    budget = measure_votes(pairs, list(range(300)), voting={}, samples=K, seed=0, greedy=pairs)
    interval = (0.0, 1.0)
    result = EvaluationResult(
        accuracy=0.9, interval=interval, accuracy_by_order={}, accuracy_by_order_intervals={}, order_consistency=1.0,
        order_consistency_interval=interval, unparsable_rate=0.0, unparsable_rate_interval=interval, format_rate=1.0,
        format_rate_interval=interval, answer_1_rate=0.5, counts=Counts(pairs=300, samples=300, failed=0), voting={},
        voting_intervals={}, any_correct={}, any_correct_intervals={}, mean_response_tokens=10.0,
        mean_response_tokens_interval=interval, by_category={}, vote_budget=budget, weights=model_identity(folder),
    )  # fmt: skip
    place.write_text(result.to_json())
    return place


@pytest.mark.slow
def test_a_folder_carries_the_calibration_of_its_own_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / FILE).write_text(PromptPolicy(template=TEMPLATE).to_json())
    path = evaluated(folder, tmp_path / "evaluation.json")
    done = CliRunner().invoke(app, ["calibrate", str(folder), str(path)])
    assert done.exit_code == 0, done.output
    assert "log_prob, votes greedy: temperature 0." in done.stdout
    policy = policy_of(folder)
    assert policy is not None
    judge = SimulatedJudge({"good": 1.0, "bad": -1.0})
    for votes, carried in ((Votes(), True), (Votes(samples=3), True), (Votes(samples=4), False),
                           (Votes(adaptive=Adaptive()), True), (Votes(samples=3, temperature=0.7), False)):  # fmt: skip
        found = asyncio.run(compare(judge, Item(question="Which?"), ("good", "bad"), votes, policy=policy))
        assert found.probability is not None
        assert (found.calibrated is not None) == carried, votes
        if found.calibrated is not None:
            assert found.calibrated > found.probability > 0.5  # this judge understates: its temperature is below 1
    (folder / "config.json").write_text('{"other": "weights"}')
    other = policy_of(folder)
    assert other is not None and other.calibration == ()
    refused = CliRunner().invoke(app, ["calibrate", str(folder), str(path)])
    assert refused.exit_code == 2 and "was measured on other weights" in refused.stderr
    assert json.loads((folder / FILE).read_text())["template"] == TEMPLATE
