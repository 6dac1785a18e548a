"""Attention over sequences that context parallelism has cut: values and gradients are those of the whole row, sequence
by sequence, on a CPU and on the second device, and a mistake of the mask would be seen."""

from __future__ import annotations

import functools
import itertools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.parallel

HEADS, GROUPS, DIM = 4, 2, 8
BOUNDS = (0, 16, 24, 64)  # with four ranks a chunk of the second sequence is one token


def tensors() -> dict[str, torch.Tensor]:
    """Queries, keys, values and what the output is weighed with: float64 [T, heads, DIM]."""
    generator = torch.Generator().manual_seed(7)
    heads = {"query": HEADS, "key": GROUPS, "value": GROUPS, "weight": HEADS}
    return {
        name: torch.randn(BOUNDS[-1], count, DIM, generator=generator, dtype=torch.float64)
        for name, count in heads.items()
    }


def _attend(upper_left: bool) -> dict[str, np.ndarray]:
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.nn.attention.bias import causal_upper_left

    from megatron_r1reward.config.schema import ParallelSection
    from megatron_r1reward.parallel import setup, specs
    from megatron_r1reward.parallel.context import split_context

    if upper_left:
        specs.causal_lower_right = causal_upper_left  # this process is a fork
    topology = setup.initialize(ParallelSection(context_parallel_size=int(os.environ["WORLD_SIZE"])), seed=0)
    group, device = parallel_state.get_context_parallel_group(), topology.device
    split = split_context(BOUNDS, group, device)
    assert split is not None
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, kv_channels=DIM)
    attention = specs.PackedAttention(
        config,
        1,
        AttnMaskType.causal,
        "self",
        pg_collection=SimpleNamespace(cp=group),  # type: ignore[arg-type]
    )
    whole = {name: value.to(device) for name, value in tensors().items()}
    mine = {name: value.index_select(0, split.positions) for name, value in whole.items()}
    leaves = [mine[name].detach().requires_grad_() for name in ("query", "key", "value")]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32).to(device)
    output = attention(*leaves, None, packed_seq_params=specs.packed(bounds, BOUNDS, split))
    (output * mine["weight"]).sum().backward()
    found = {"positions": split.positions, "output": output.detach()}
    found |= {name: leaf.grad for name, leaf in zip(("query", "key", "value"), leaves, strict=True)}  # type: ignore[misc]
    return {name: value.cpu().numpy().copy() for name, value in found.items()}


def _attend_on_the_device(upper_left: bool) -> dict[str, np.ndarray]:
    import second_device

    second_device.install()
    with second_device.Rules():
        return _attend(upper_left)


def _truth() -> dict[str, np.ndarray]:
    """One row, one mask, plain softmax: a token sees its own sequence up to itself."""
    whole = tensors()
    leaves = {name: whole[name].requires_grad_() for name in ("query", "key", "value")}
    sequence = torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(itertools.pairwise(BOUNDS))])
    seen = (sequence[:, None] == sequence) & torch.ones(BOUNDS[-1], BOUNDS[-1]).tril().bool()
    key, value = (leaves[name].repeat_interleave(HEADS // GROUPS, dim=1) for name in ("key", "value"))
    scores = torch.einsum("qhd,khd->hqk", leaves["query"], key) / DIM**0.5
    output = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
    (output * whole["weight"]).sum().backward()
    found = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    return {name: value.numpy().copy() for name, value in found.items()}  # type: ignore[union-attr]


@functools.cache
def truth() -> dict[str, np.ndarray]:
    """`_truth` in a process of its own: ranks that are forked after a backward here would have no second device."""
    (found,) = run_ranks(_truth, 1)
    return found


def differences(ranks: list[dict[str, np.ndarray]]) -> dict[tuple[str, int], float]:
    """Largest difference from the truth by tensor and sequence, every token on exactly one rank."""
    places = np.concatenate([rank["positions"] for rank in ranks])
    assert sorted(places.tolist()) == list(range(BOUNDS[-1]))
    found = {}
    for name, expected in truth().items():
        joined = np.empty_like(expected)
        joined[places] = np.concatenate([rank[name] for rank in ranks])
        error = np.abs(joined - expected)
        for number, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
            found[name, number] = float(error[start:end].max())
    return found


@pytest.mark.parametrize(("ranks", "where"), [(2, _attend_on_the_device), (2, _attend), (4, _attend)])
def test_a_cut_sequence_attends_as_the_whole_one(ranks: int, where) -> None:  # type: ignore[no-untyped-def]
    results = run_ranks(where, ranks, False)
    first = [int(rank["positions"][0]) for rank in results]
    assert all(BOUNDS[0] < start < BOUNDS[1] for start in first[1:]), "their queries begin in mid-sequence"
    found = differences(results)
    assert max(found.values()) < 1e-12, found


def test_a_mask_from_the_upper_left_would_be_seen_in_every_sequence() -> None:
    """A chunk in mid-sequence would see only as many keys as it has queries before it within the chunk."""
    found = differences(run_ranks(_attend, 2, True))
    assert all(found["output", number] > 0.1 for number in range(len(BOUNDS) - 1)), found
