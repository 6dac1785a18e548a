"""Even shares: what the slowest rank has to do against the mean, for lengths as reward models see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from megatron_r1reward.data.balance import Bins, Cost, ModelCost, spread_over_ranks

QWEN_7B = Path(__file__).parents[2] / "data" / "qwen2_5_vl_7b"
MINI_BATCHES, PER_MINI_BATCH = 4, 128


def batch(seed: int, *, samples: int = 1) -> list[Cost]:
    """Prompts with an image of 0.05 to 0.5 megapixels and some hundred words, responses of some 600 tokens."""
    price, random = ModelCost.of(AutoConfig.from_pretrained(QWEN_7B)), np.random.default_rng(seed)
    costs = []
    for number in range(MINI_BATCHES * PER_MINI_BATCH // samples):
        patches, text = int(random.integers(256, 2560)), int(random.lognormal(6.5, 0.6))
        for _ in range(samples):
            response = int(np.clip(random.lognormal(6.2, 0.5), 20, 2048))
            costs.append(price(tokens=text + patches // 4 + response, response_tokens=response, patches=patches,
                               images_key=number if samples > 1 else None))  # fmt: skip
    return costs


def by_turns(costs: list[Cost], idle: list[bool], ranks: int) -> float:
    """Slowest over mean where rollouts are dealt like cards."""
    slowest = mean = 0.0
    for first in range(0, len(costs), PER_MINI_BATCH):
        part = [0.0 if idle[i] else costs[i].own + costs[i].images for i in range(first, first + PER_MINI_BATCH)]
        loads = [sum(part[rank::ranks]) for rank in range(ranks)]
        slowest, mean = slowest + max(loads), mean + sum(loads) / ranks
    return slowest / mean


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("idle_share", [0.0, 0.3])
def test_nobody_waits_for_the_slowest(ranks: int, idle_share: float) -> None:
    for seed in range(5):
        costs = batch(seed)
        idle = (np.random.default_rng(seed).random(len(costs)) < idle_share).tolist()
        shards, imbalance = spread_over_ranks(costs, idle, mini_batches=MINI_BATCHES, ranks=ranks)
        assert imbalance < 1.01
        assert by_turns(costs, idle, ranks) > 1.1
        again, _ = spread_over_ranks(costs, idle, mini_batches=MINI_BATCHES, ranks=ranks)
        assert again == shards


def test_the_pass_for_log_probs_is_even_too() -> None:
    costs = batch(0)
    idle = [i % 3 == 0 for i in range(len(costs))]
    shards, _ = spread_over_ranks(costs, idle, mini_batches=MINI_BATCHES, ranks=8)
    loads = [sum(costs[i].own + costs[i].images for part in shards for i in part[rank]) for rank in range(8)]
    assert max(loads) / np.mean(loads) < 1.01


def test_samples_of_one_image_stay_together_where_that_is_cheaper() -> None:
    """Eight samples of each prompt on four ranks: the towers run for little more than every image once."""
    costs = batch(0, samples=8)
    shards, imbalance = spread_over_ranks(costs, [False] * len(costs), mini_batches=MINI_BATCHES, ranks=4)
    assert imbalance < 1.05
    images = [len({costs[i].images_key for i in members}) for part in shards for members in part]
    assert sum(images) < 2 * len({cost.images_key for cost in costs})


@pytest.mark.parametrize(("total", "mini_batches", "ranks"), [(8, 2, 4), (9, 2, 4), (512, 4, 8), (7, 1, 7)])
def test_everything_is_somewhere_and_nobody_is_left_out(total: int, mini_batches: int, ranks: int) -> None:
    """The content of a mini-batch is that of one rank, also where most are idle."""
    costs = [Cost(own=1.0 + i % 5) for i in range(total)]
    for idle in ([False] * total, [i % 4 != 0 for i in range(total)], [True] * total):
        shards, _ = spread_over_ranks(costs, idle, mini_batches=mini_batches, ranks=ranks)
        alone, _ = spread_over_ranks(costs, idle, mini_batches=mini_batches, ranks=1)
        assert [sorted(i for members in part for i in members) for part in shards] == [part[0] for part in alone]
        assert [i for part in alone for i in part[0]] == list(range(total))
        assert all(members for part in shards for members in part)


def test_too_few_rollouts() -> None:
    with pytest.raises(ValueError, match="7 rollouts are too few for 2 optimizer steps on 4 data-parallel ranks"):
        spread_over_ranks([Cost(own=1.0)] * 7, [False] * 7, mini_batches=2, ranks=4)


def test_an_image_is_paid_for_once_per_bin() -> None:
    bins = Bins(2)
    bins.add({i: Cost(own=1.0, images=10.0, images_key="a") for i in range(3)} | {3: Cost(own=12.0)})
    assert bins.members == [[0, 1, 2], [3]]
    assert bins.loads == [13.0, 12.0]


def test_costs_of_the_7b_model() -> None:
    """2 FLOPs per parameter and token: 6.5 billion parameters in the layers, 0.6 billion in the tower's."""
    price = ModelCost.of(AutoConfig.from_pretrained(QWEN_7B))
    assert price.per_token == pytest.approx(2 * 6.53, rel=0.01)
    assert price.per_patch == pytest.approx(2 * 0.63, rel=0.01)
    assert price.per_response_token == pytest.approx(2e-9 * 3584 * 152_064)
