"""Equal work for all: sequences spread over data-parallel ranks and micro-batches by what they cost.

Greedy, the dearest first into the lowest bin (Graham 1969), and then exchanges between the fullest bin and another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST_EXCHANGES = 200


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one sequence. Those with equal `images_key` (not None) in one bin pay for their images once."""

    own: float
    images: float = 0.0
    images_key: Hashable = None


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Floating-point operations of a forward pass, in units of 1e9; a backward pass is in proportion to it.

    Attributes:
        per_token, per_token_pair: of the language model; attention is causal.
        per_response_token: of the LM head, which runs there only.
        per_patch: of the vision tower.
    """

    per_token: float
    per_token_pair: float
    per_response_token: float
    per_patch: float

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelCost:
        """From a Hugging Face configuration; matrix multiplications only."""
        text: Any = getattr(config, "text_config", None) or config
        hidden, layers = text.hidden_size, text.num_hidden_layers
        head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        attention = 2 * hidden * head * (text.num_attention_heads + text.num_key_value_heads)
        mlp = 3 * hidden * text.intermediate_size
        if (active := getattr(text, "num_experts_per_tok", None)) is not None:
            mlp = 3 * hidden * text.moe_intermediate_size * active
        vision: Any = config.vision_config
        width = vision.hidden_size
        tower = vision.depth * (4 * width**2 + 3 * width * vision.intermediate_size)
        return cls(
            per_token=2e-9 * layers * (attention + mlp),
            per_token_pair=2e-9 * layers * head * text.num_attention_heads,
            per_response_token=2e-9 * hidden * text.vocab_size,
            per_patch=2e-9 * tower,
        )

    def __call__(self, *, tokens: int, response_tokens: int, patches: int = 0, images_key: Hashable = None) -> Cost:
        """Of one sequence of `tokens`, image placeholders expanded, `response_tokens` of them."""
        own = self.per_token * tokens + self.per_token_pair * tokens**2 + self.per_response_token * response_tokens
        return Cost(own=own, images=self.per_patch * patches, images_key=images_key)


_Unit = tuple[float, tuple[int, ...]]  # sequences that stay together, and what they cost


class Bins:
    """Bins that are filled by `add`; what is in them stays. Deterministic."""

    def __init__(self, number: int) -> None:
        self.members: list[list[int]] = [[] for _ in range(number)]
        self.loads = [0.0] * number

    def add(self, costs: Mapping[int, Cost]) -> None:
        """Spread the sequences with these numbers.

        Those with the same images stay together, unless the fullest bin is lower when they may be apart and their
        images are paid for in several bins.
        """
        together: dict[Hashable, list[int]] = {}
        for index, cost in costs.items():
            together.setdefault((cost.images_key,) if cost.images_key is not None else index, []).append(index)
        units = [
            (sum(costs[i].own for i in members) + costs[members[0]].images, tuple(members))
            for members in together.values()
        ]
        plans = [self._units(units)]
        if len(units) < len(costs):
            plans.append(self._apart(costs))
        self.members, self.loads = min(plans, key=lambda plan: (plan[0].count([]), max(plan[1], default=0.0)))

    def _units(self, units: Sequence[_Unit]) -> tuple[list[list[int]], list[float]]:
        """The dearest unit first, into the lowest bin; then single ones change places as long as that helps."""
        loads, placed = list(self.loads), [list[_Unit]() for _ in self.loads]
        sizes = list(map(len, self.members))
        for unit in sorted(units, key=lambda unit: (-unit[0], unit[1])):
            lowest = min(range(len(loads)), key=lambda n: (loads[n], sizes[n], n))
            placed[lowest].append(unit)
            loads[lowest] += unit[0]
            sizes[lowest] += len(unit[1])
        for _ in range(_MOST_EXCHANGES):
            if not _exchange(loads, placed):
                break
        added = [[i for _, members in units for i in members] for units in placed]
        return [old + new for old, new in zip(self.members, added, strict=True)], loads

    def _apart(self, costs: Mapping[int, Cost]) -> tuple[list[list[int]], list[float]]:
        """The dearest sequence first, into the bin that is left lowest with it and with images that are new there."""
        members, loads = [list(one) for one in self.members], list(self.loads)
        images: list[set[Hashable]] = [set() for _ in loads]
        for index in sorted(costs, key=lambda i: (-costs[i].own - costs[i].images, i)):
            cost = costs[index]
            prices = [cost.own + (0.0 if cost.images_key in known else cost.images) for known in images]
            best = min(range(len(loads)), key=lambda n: (loads[n] + prices[n], len(members[n]), n))
            loads[best] += prices[best]
            members[best].append(index)
            images[best] |= set() if cost.images_key is None else {cost.images_key}
        return members, loads


def _exchange(loads: list[float], placed: list[list[_Unit]]) -> bool:
    """Let a unit of the fullest bin change places with one of another bin, or with none, where the fuller of the two is
    then lowest. False when nothing helps."""
    full = max(range(len(loads)), key=lambda n: (loads[n], -n))
    best: tuple[float, int, _Unit | None, _Unit | None] = (loads[full] * (1 - 1e-6), -1, None, None)
    for other, units in enumerate(placed):
        for mine in placed[full] if other != full else ():
            for theirs in [None, *units]:
                moved = mine[0] - (0.0 if theirs is None else theirs[0])
                fuller = max(loads[full] - moved, loads[other] + moved)
                if moved > 0 and fuller < best[0] and (theirs is not None or len(placed[full]) > 1):
                    best = (fuller, other, mine, theirs)
    _, other, given, taken = best
    if given is None:
        return False
    placed[full].remove(given)
    placed[other].append(given)
    if taken is not None:
        placed[other].remove(taken)
        placed[full].append(taken)
    moved = given[0] - (0.0 if taken is None else taken[0])
    loads[full], loads[other] = loads[full] - moved, loads[other] + moved
    return True


def spread_over_ranks(
    costs: Sequence[Cost], idle: Sequence[bool], *, mini_batches: int, ranks: int
) -> tuple[list[list[list[int]]], float]:
    """Numbers of the sequences of each mini-batch and in it of each data-parallel rank, in order; and the expected
    time of the slowest rank over the mean, which is 1 where nobody waits.

    Mini-batches are cut from the batch as it stands, so what an optimizer step trains on does not depend on the number
    of ranks. `idle` sequences only take part in the forward pass for log-probs; they are spread after the others, so
    that both this pass and the update are even.

    Raises:
        ValueError: there are fewer sequences than ranks in some mini-batch.
    """
    total = len(costs)
    if total < mini_batches * ranks:
        raise ValueError(
            f"{total} rollouts are too few for {mini_batches} optimizer steps on {ranks} data-parallel ranks"
        )
    shards, slowest, mean, first = [], 0.0, 0.0, 0
    for number in range(mini_batches):
        size = total // mini_batches + (number < total % mini_batches)
        indices = range(first, first + size)
        first += size
        bins = Bins(ranks)
        bins.add({i: costs[i] for i in indices if not idle[i]})
        working = list(bins.loads)
        bins.add({i: costs[i] for i in indices if idle[i]})
        loads = working if any(working) else bins.loads
        slowest, mean = slowest + max(loads), mean + sum(loads) / ranks
        shards.append([sorted(members) for members in bins.members])
    return shards, slowest / mean
