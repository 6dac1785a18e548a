"""Memory by hand, and activations against what autograd really keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planner_measure import AllocatorPeak

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions, TokenInputs
from megatron_r1reward.model_folder.shape import read_shape
from megatron_r1reward.planner.catalog import bundled_config, find_model
from megatron_r1reward.planner.devices import DEVICES
from megatron_r1reward.planner.memory import (
    CPU_COLUMNS,
    TILE_ELEMENTS,
    Numerics,
    buffer_elements,
    chunk_rows,
    head_workspace,
    language_layer,
    stage_activations,
    state_bytes,
    trainer_memory,
)
from megatron_r1reward.planner.parameters import stage_tensors
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import MicroBatch, describe

SEVEN = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
BF16 = Numerics(width=2, fused_norm=True)


@pytest.mark.parametrize(
    ("width", "distributed", "per_value"),
    [(2, True, 2 + 4 + 12 / 4), (2, False, 2 + 4 + 12), (4, True, 4 + 4 + 8 / 4), (4, False, 4 + 4 + 8)],
)
def test_bytes_per_parameter(width: int, distributed: bool, per_value: float):
    layout = Layout(dp=4, distributed_optimizer=distributed)
    state = state_bytes(stage_tensors(SEVEN, layout, 0), layout, width)
    total = state.parameters + state.gradients + state.optimizer
    assert total == pytest.approx(8_292_166_656 * per_value, rel=1e-6)


def test_context_parallel_ranks_share_the_optimizer_state_too():
    layout = Layout(cp=2, dp=2)
    state = state_bytes(stage_tensors(SEVEN, layout, 0), layout, 2)
    assert state.optimizer == math.ceil(8_292_166_656 * 12 / 4)


def test_frozen_parts_have_neither_gradients_nor_optimizer_state():
    tensors, layout = stage_tensors(SEVEN, Layout(), 0), Layout()
    state = state_bytes(tensors, layout, 2, frozenset({"vision tower", "vision merger"}))
    trained = 8_292_166_656 - 631_976_960 - 44_573_184
    assert state.parameters == 2 * 8_292_166_656
    assert state.optimizer == 12 * trained
    assert 0 <= state.gradients - 4 * trained < 4 * 64 * len(tensors)


def test_gradient_buffers_are_padded_as_megatron_core_does():
    # 100 -> 128 and 65 -> 128 values; the end to a multiple of lcm(128, 3) = 384
    assert buffer_elements([(100, 1), (65, 1)], 3, distributed=True) == 384
    assert buffer_elements([(100, 2), (65, 1)], 1, distributed=True) == 384
    assert buffer_elements([(100, 1), (65, 1)], 3, distributed=False) == 165


def test_one_layer_by_hand():
    """7B, bf16, TP 4 with sequence parallelism: bytes per token."""
    layout = Layout(tp=4, sequence_parallel=True)
    saved = language_layer(SEVEN.text, layout, BF16, sparse=False)
    query, key_value = 3584 / 4, 2 * 512 / 4
    assert saved["norms"] == 2 * (2 * 3584 + 4) / 4
    assert saved["linear inputs"] == 2 * 2 * 3584 / 4
    assert saved["rotation"] == 4 * 128 * 2
    assert saved["queries, keys, values"] == 2 * (query + key_value / 2) + 2 * (query + key_value)
    assert saved["attention output"] == 2 * query * 2 + 4 * 28 / 4
    assert saved["mlp"] == 5 * 2 * 18944 / 4


def test_full_recomputation_keeps_layer_inputs_and_one_layer():
    batch = MicroBatch(name="x", tokens=1000, sequences=1, patches=0, responses=10, longest=1000)
    layout = Layout(recompute="full")
    found = stage_activations(SEVEN, layout, BF16, batch, stage=0, micro_batches=1)
    ends = 1000 * (2 * 3584 + 4) + 10 * 3584 * 2
    assert found.language == 28 * 3584 * 2 * 1000 + ends
    assert found.vision == 0


def test_the_head_holds_one_chunk_of_logits_not_all():
    """7B, bf16: beside the gradient of the response rows."""

    def workspace(rows: int, tp: int = 1, fused_loss: bool = False) -> float:
        found = head_workspace(SEVEN.text, Layout(tp=tp), BF16, rows, fused_loss=fused_loss)
        return found - (2 if fused_loss else 1) * rows * 3584 * 2

    weights = 152_064 * 3584
    assert workspace(4096) == workspace(100_000) == 2 * 4096 * 152_064 + 2 * weights
    assert workspace(4096, tp=4) == workspace(4096) / 4
    assert workspace(4096, fused_loss=True) == 4 * weights + (2 * 4 + 2) * 2048 * 152_064
    rounded = head_workspace(SEVEN.text, Layout(), replace(BF16, logits_width=2), 4096, fused_loss=False)
    assert rounded == workspace(4096) + 4096 * 3584 * 2  # twice the rows: a chunk has the same size


def test_the_planned_chunks_are_those_of_the_kernels():
    from megatron_r1reward.kernels import lm_head
    from megatron_r1reward.kernels.policy_loss import torch_rows

    assert (CPU_COLUMNS, TILE_ELEMENTS) == (lm_head.CPU_COLUMNS, torch_rows.TILE_ELEMENTS)
    for columns in (512, 38_016, 152_064, 10_000_000):
        for device, fused in (("cpu", False), ("cuda", True)):
            for dtype in (torch.float32, torch.bfloat16):
                numerics = Numerics(width=2, fused_norm=fused, logits_width=dtype.itemsize)
                expected = lm_head.default_chunk_rows(columns, torch.device(device), dtype)
                assert chunk_rows(numerics, columns) == expected


def test_earlier_pipeline_stages_keep_more_micro_batches():
    layout = Layout(pp=4, chunk_layers=(7, 7, 7, 7))
    assert [layout.chunks_in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [layout.chunks_in_flight(stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = Layout(pp=2, vpp=2)
    assert [interleaved.chunks_in_flight(stage, 8) for stage in range(2)] == [5, 3]
    assert interleaved.layers_of(0, 28) == [*range(7), *range(14, 21)]


def test_the_longest_sequence_decides_where_it_exceeds_the_budget(make_config):
    config = make_config("Qwen2.5-VL-7B-Instruct", **{"data.token_budget": 8192, "data.max_prompt_tokens": 20_480})
    work = describe(config, SEVEN, Layout(), "sft")
    # prompt without images, one image of 501,760 pixels, plan.longest_response
    full, single = work.largest
    assert single.tokens == 20_480 + 640 + 2048
    assert (full.tokens, full.sequences, full.patches) == (8192, 3, 3 * 2560)
    assert work.mean.tokens == 3 * (1200 + 640 + 600)
    short = make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **{"rollout.max_model_len": 4096})
    assert describe(short, SEVEN, Layout(), "rl").longest == 4096


def test_more_ranks_never_need_more_memory_each(make_config):
    config = make_config("Qwen2.5-VL-7B-Instruct")

    def peak(layout: Layout) -> float:
        work = describe(config, SEVEN, layout, "sft")
        return max(m.total for m in trainer_memory(SEVEN, layout, BF16, work, DEVICES["h100"]))

    assert peak(Layout(tp=4, dp=2)) < peak(Layout(tp=2, dp=2)) < peak(Layout(dp=2))
    assert peak(Layout(tp=4, dp=2, sequence_parallel=True)) < peak(Layout(tp=4, dp=2))
    assert peak(Layout(tp=4, dp=4)) < peak(Layout(tp=4, dp=2))
    assert peak(Layout(tp=4, cp=2)) < peak(Layout(tp=4, dp=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("member", "recompute"),
    [
        ("qwen2_5_vl", "none"),
        ("qwen2_5_vl", "selective"),
        ("qwen2_5_vl", "full"),
        ("qwen3_vl", "none"),
        ("qwen3_vl_moe", "none"),
    ],
)
def test_what_autograd_keeps(member: str, recompute: str, tmp_path: Path, image_paths: tuple[str, ...]):
    """One forward pass of the real model: the storages that autograd keeps, against the list of the planner."""
    from megatron_r1reward.config.schema import ParallelSection
    from megatron_r1reward.demo.tiny_models import TINY_SPECS, write_tiny_checkpoint
    from megatron_r1reward.parallel import setup

    write_tiny_checkpoint(tmp_path / "model", corpus=["Which digit is shown? 7"] * 4, spec=TINY_SPECS[member])
    section = ParallelSection(recompute=recompute)
    topology = setup.initialize(section, seed=0)
    try:
        measured, batch = _saved_bytes(tmp_path / "model", image_paths, section, topology)
    finally:
        setup.shutdown()
    planned = stage_activations(
        find_model(tmp_path / "model").shape,
        Layout(recompute=recompute),
        Numerics(width=4, fused_norm=False),
        batch,
        stage=0,
        micro_batches=1,
    )
    assert planned.language + planned.vision == pytest.approx(measured, rel=0.03)


def _saved_bytes(folder: Path, image_paths, section, topology) -> tuple[int, MicroBatch]:
    from transformers import AutoTokenizer

    from megatron_r1reward.config.schema import MoeSection, PrecisionSection, RunConfig
    from megatron_r1reward.models.registry import family_of, load_hf_config
    from megatron_r1reward.training.state import build_packer
    from megatron_r1reward.types import Prompt

    hf = load_hf_config(folder)
    config = RunConfig.model_validate(
        {"run": {"output_dir": "x"}, "model": {"path": folder}, "data": {"train": "x", "max_pixels": 50_176}}
    )
    packer = build_packer(config, hf, AutoTokenizer.from_pretrained(folder), topology)
    sequences = []
    for index, path in enumerate(image_paths):
        prompt = Prompt(
            id=str(index),
            preference_id=str(index),
            token_ids=(hf.image_token_id, *range(20, 140 + 30 * index)),
            image_paths=(path,),
            label=1,
            swapped=False,
        )
        sequences.append(packer.sequence(prompt, range(30, 60)))
    batch = packer.pack(sequences, range(len(sequences)))
    family = family_of(hf)
    model = family.build_model(
        family.build_configs(hf, section, torch.float32, PrecisionSection(), MoeSection()), topology
    ).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert batch.pixel_values is not None
    described = MicroBatch(
        name="packed",
        tokens=batch.num_tokens,
        sequences=len(sequences),
        patches=len(batch.pixel_values),
        responses=batch.targets.numel(),
        longest=max(len(s.token_ids) for s in sequences),
    )
    return sum(size for address, size in storages.items() if address not in weights), described


@pytest.mark.slow
@pytest.mark.parametrize("fused_loss", [False, True], ids=["log_probs", "fused_loss"])
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_the_heads_peak_is_that_of_the_allocator(fused_loss: bool, dtype: torch.dtype, logits_dtype: torch.dtype):
    """With megatron-core's gradient buffer; some tokens are clipped, as in a later step of a rollout batch."""
    rows, hidden, vocab = 1200, 64, 2048
    generator = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((0.1 * torch.randn(vocab, hidden, generator=generator)).to(dtype))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocab, hidden), False
    targets = torch.randint(vocab, (rows,), generator=generator)
    inputs = TokenInputs(
        targets=targets,
        old_log_probs=linear_log_probs(hidden_RH, weight, targets)[0].detach() - 0.1,
        advantages=torch.where(torch.arange(rows) % 10 == 0, -1.0, 1.0),
        weights=torch.ones(rows),
    )
    inputs.old_log_probs[:10] -= 1.0  # clipped

    head = HeadOptions(logits_dtype=logits_dtype)

    def loss() -> torch.Tensor:
        if fused_loss:
            return linear_policy_loss(hidden_RH, weight, inputs, PolicyLossOptions(), head_options=head).total
        return linear_log_probs(hidden_RH, weight, targets, options=head)[0].sum()

    loss().backward()
    hidden_RH.grad = None
    with AllocatorPeak() as peak:
        loss().backward()
    text = replace(SEVEN.text, hidden=hidden, vocab=vocab)
    numerics = Numerics(width=dtype.itemsize, fused_norm=False, logits_width=logits_dtype.itemsize)
    planned = head_workspace(text, Layout(), numerics, rows, fused_loss=fused_loss)
    assert planned == pytest.approx(peak.bytes, rel=0.15)
