"""Layouts invert each other, ranks' shards make the whole, and a table describes nothing twice."""

from __future__ import annotations

import pytest
import torch

from megatron_r1reward.model_folder.weight_table import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Entry,
    GatedMLP,
    GroupedQKV,
    Layout,
    Plain,
    Tie,
    Vocabulary,
    WeightTable,
)

CASES: dict[str, tuple[Layout, list[tuple[int, ...]], int]] = {  # layout, Hugging Face shapes, largest size
    "replicated": (REPLICATED, [(6,)], 4),
    "column": (COLUMN, [(8, 3)], 4),
    "row": (ROW, [(3, 8)], 4),
    "patch_embed": (Plain(megatron_shape=(4, -1), hf_shape=(4, 3, 2, 2, 2)), [(4, 3, 2, 2, 2)], 2),
    "grouped_queries": (GroupedQKV(groups=2, head_dim=4), [(24, 5), (8, 5), (8, 5)], 2),
    "one_key_head": (GroupedQKV(groups=1, head_dim=4), [(16, 5), (4, 5), (4, 5)], 2),
    "biases": (GroupedQKV(groups=2, head_dim=4), [(24,), (8,), (8,)], 2),
    "vision": (GroupedQKV(groups=4, head_dim=2, stacked=True), [(24, 5)], 4),
    "gated": (GATED, [(8, 3), (8, 3)], 4),
    "gated_fused_transposed": (GatedMLP(fused=True, transposed=True), [(3, 16)], 4),
    "down_transposed": (Plain(partition_dim=1, transposed=True), [(8, 3)], 4),
    "vocabulary": (Vocabulary(rows=10), [(10, 3)], 4),  # 4 ranks: padded to 12
}


@pytest.mark.parametrize("case", CASES)
def test_merge_split_shard_and_unshard_lose_nothing(case: str) -> None:
    layout, shapes, largest = CASES[case]
    parts = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    full = layout.merge(parts)
    for back, part in zip(layout.split(full), parts, strict=True):
        assert torch.equal(back, part)
    for size in (1, 2, largest):
        shards = [layout.shard(full, size, rank) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        assert torch.equal(layout.unshard(shards), full)


def test_a_group_holds_its_queries_then_its_key_and_value() -> None:
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    full = GroupedQKV(groups=2, head_dim=2).merge((q, k, v))
    assert full.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_a_rank_holds_a_slice_of_gate_and_the_same_slice_of_up() -> None:
    assert GATED.shard(torch.arange(8), 2, 1).tolist() == [2, 3, 6, 7]


def test_a_cut_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide by tensor-parallel size 4"):
        COLUMN.shard(torch.zeros(6, 2), 4, 0)


def experts(stacked: bool) -> WeightTable:
    """A layer with two experts, dense norms and a tied embedding."""
    prefix = "language_model.decoder.layers.3."
    entries = [
        Entry(
            megatron=f"{prefix}mlp.experts.local_experts.{e}.linear_fc1.weight",
            hf=("layers.3.experts.gate_up",) if stacked else (f"layers.3.experts.{e}.gate", f"layers.3.experts.{e}.up"),
            shapes=((2, 6, 3),) if stacked else ((3, 3), (3, 3)),
            layout=GatedMLP(fused=stacked),
            expert=e,
            stacked=stacked,
        )
        for e in (0, 1)
    ]
    norm = Entry(
        megatron=f"{prefix}input_layernorm.weight",
        hf=("norm",),
        shapes=((3,),),
        layout=REPLICATED,
        saved_as=f"{prefix}self_attention.linear_qkv.layer_norm_weight",
    )
    embedding = Entry(megatron="embedding", hf=("embed",), shapes=((4, 3),), layout=Vocabulary(rows=4))
    tie = Tie(to="embedding", megatron="output_layer", hf="lm_head")
    return WeightTable(entries=(*entries, norm, embedding), tie=tie, spellings=(("model.", ""),))


def test_checkpoint_keys_stack_layers_and_experts() -> None:
    table = experts(stacked=True)
    keys = [table.checkpoint_key(entry) for entry in table]
    assert keys[1].key == "language_model.decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert keys[1].index == (3, 1)
    assert keys[2].key == "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    mixed = WeightTable(entries=table.entries, separate_layers=("language_model.",))
    separate = mixed.checkpoint_key(table.entries[1])
    assert (separate.key, separate.index) == (
        "language_model.decoder.layers.3.mlp.experts.experts.linear_fc1.weight",
        (1,),
    )


def test_stacked_experts_are_elements_of_one_tensor() -> None:
    table = experts(stacked=True)
    stacked = torch.randn(2, 6, 3)
    assert table.hf_names == ["layers.3.experts.gate_up", "norm", "embed"]
    assert torch.equal(table.entries[1].hf_part(stacked), stacked[1])
    assert len(experts(stacked=False).hf_names) == 6
    assert table.canonical("model.embed") == table.canonical("embed") == "embed"
    assert table.by_megatron["output_layer"] is table.by_megatron["embedding"]


def test_a_tensor_described_twice_is_refused() -> None:
    entry = Entry(megatron="a", hf=("x",), shapes=((2, 2),), layout=COLUMN)
    with pytest.raises(ValueError, match="twice"):
        WeightTable(entries=(entry, Entry(megatron="b", hf=("x",), shapes=((2, 2),), layout=COLUMN)))
    with pytest.raises(ValueError, match="twice"):
        WeightTable(entries=(entry, Entry(megatron="a", hf=("y",), shapes=((2, 2),), layout=COLUMN)))
