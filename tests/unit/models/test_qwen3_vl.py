"""What only Qwen3-VL has: deepstack, interleaved M-RoPE, video frames, routers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CORPUS
from family import DEEP, DEEP_MOE, Member, reference_model, response_log_probs, video_batch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from megatron_r1reward.checkpoint.hf_model_io import load_hf_weights
from megatron_r1reward.config.schema import MoeSection, ParallelSection
from megatron_r1reward.demo.tiny_models import TinyQwen3Spec, write_tiny_checkpoint
from megatron_r1reward.models.qwen3_vl.config import build_configs
from megatron_r1reward.models.qwen3_vl.layers import WeightedRouter
from megatron_r1reward.models.qwen3_vl.model import Qwen3VL
from megatron_r1reward.models.qwen3_vl.vision import patch_layout
from megatron_r1reward.models.registry import shape_of, weight_table
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import PackedBatch


@pytest.fixture(scope="module")
def topology():
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


def write_member(folder: Path, spec: TinyQwen3Spec) -> Member:
    write_tiny_checkpoint(folder, corpus=CORPUS, spec=spec, init_std=0.15)
    return Member(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Member:
    return write_member(tmp_path_factory.mktemp("dense") / "checkpoint", DEEP)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Member:
    return write_member(tmp_path_factory.mktemp("experts") / "checkpoint", DEEP_MOE)


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 6, 10), (3, 4, 26), (1, 16, 2)])
def test_patch_layout_is_that_of_transformers(grid: tuple[int, int, int]) -> None:
    grids = torch.tensor([grid, (1, 4, 4)])
    layout = patch_layout(grids, merge_size=2, table_side=8)
    assert torch.equal(layout.positions, get_vision_position_ids(grids, 2))
    rows, weights = get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=8, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(layout.table_rows, rows)
    torch.testing.assert_close(layout.table_weights, weights, atol=1e-6, rtol=0)


def test_every_deepstack_level_reaches_the_log_probs(dense, topology, image_paths):
    model = dense.build(topology)
    batch = dense.packer.pack([dense.sequence(1, image_paths[:2])], [0])
    seen = model(batch)[0]
    for merger in model.vision.deepstack_mergers:
        bias = merger.mlp.encoder.linear_fc2.bias
        with torch.no_grad():
            bias.add_(1.0)
            assert (model(batch)[0] - seen).abs().max() > 1e-2
            bias.sub_(1.0)


def test_video_frames_are_those_of_transformers(dense, topology, image_paths):
    """A video is one grid for transformers and one image per frame here, with the time written between the frames."""
    grid = (2, 6, 4)
    frames = list(torch.randn(48, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0)).split(24))
    video = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    prompt = dense.tokenizer.encode(f"<|im_start|>user\n<0.5 seconds>{video}<1.5 seconds>{video}Which digit?")
    ids = [*prompt, *dense.tokenizer.encode("The image shows 7.")]
    reference = reference_model(dense)
    ids_1T = torch.tensor([ids])
    expected = response_log_probs(
        reference,
        ids_1T,
        len(prompt),
        {
            "pixel_values_videos": torch.cat(frames),
            "video_grid_thw": torch.tensor([grid]),
            "mm_token_type_ids": 2 * (ids_1T == dense.config.video_token_id).int(),
        },
    )
    log_probs_R = dense.build(topology)(video_batch(dense, frames, grid, ids, len(prompt)))[0]
    torch.testing.assert_close(log_probs_R, expected, atol=1e-4, rtol=0)


def build(member: Member, topology: setup.Topology, moe: MoeSection) -> Qwen3VL:
    configs = build_configs(member.config, ParallelSection(), torch.float32, moe=moe)
    model = Qwen3VL(configs, topology)
    load_hf_weights(model, member.folder, weight_table(member.config))
    return model


def router_gradients(model: Qwen3VL, batch: PackedBatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of the routers' weights, and the logits of each router."""
    logits: list[torch.Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, WeightedRouter)]
    model.zero_grad()
    for router in routers:
        gating = router.gating
        router.gating = lambda x, gating=gating: logits.append(gating(x)) or logits[-1]
    model(batch)[0].sum().backward()
    return [router.weight.grad for router in routers], logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["aux_loss", "z_loss"])
def test_auxiliary_losses_weigh_once_per_response_token(kind, experts, topology, image_paths):
    batch = experts.packer.pack([experts.sequence(i, image_paths[:i]) for i in range(3)], range(3))
    off, _ = router_gradients(build(experts, topology, MoeSection()), batch)
    moe = (
        MoeSection(load_balancing="aux_loss", aux_loss_coefficient=0.1)
        if kind == "aux_loss"
        else MoeSection(z_loss_coefficient=0.1)
    )
    model = build(experts, topology, moe)
    on, logits = router_gradients(model, batch)
    assert len(logits) == 3, "one of four layers is dense"

    def plain(logits_TE: torch.Tensor) -> torch.Tensor:
        if kind == "z_loss":
            return logits_TE.logsumexp(-1).square().mean()
        chosen = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(2).indices, 1.0)
        return logits_TE.shape[1] * (chosen.mean(0) / 2 * logits_TE.softmax(-1).mean(0)).sum()

    # The gradient of all layers' losses together: a router also moves the inputs of later ones.
    again: list[torch.Tensor] = []
    reference = build(experts, topology, MoeSection())
    weights = [module.weight for module in reference.modules() if isinstance(module, WeightedRouter)]
    for module in reference.modules():
        if isinstance(module, WeightedRouter):
            gating = module.gating
            module.gating = lambda x, gating=gating: again.append(gating(x)) or again[-1]
    reference(batch)
    total = sum(plain(x[:, 0]) for x in again)
    expected = torch.autograd.grad(0.1 * batch.targets.numel() * total, weights)
    for gradient_on, gradient_off, difference in zip(on, off, expected, strict=True):
        scale = float(difference.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradient_on - gradient_off, difference, atol=1e-3 * scale, rtol=1e-3)


def test_routers_compute_in_float32_whatever_the_precision(experts, topology):
    configs = build_configs(experts.config, ParallelSection(), torch.bfloat16)
    model = Qwen3VL(configs, topology)
    router = next(module for module in model.modules() if isinstance(module, WeightedRouter))
    hidden = torch.randn(5, 1, DEEP_MOE.hidden_size, dtype=torch.bfloat16)
    logits = router.gating(hidden)
    assert router.weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    expected = hidden.float() @ router.weight.float().T
    torch.testing.assert_close(logits, expected, atol=0, rtol=1e-6)


def test_expert_layers_follow_the_configuration(experts):
    assert [shape_of(experts.config).text.is_sparse(layer) for layer in range(4)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("parallel", "changes", "match"),
    [
        ({"expert_model_parallel_size": 3}, {}, "has to divide 8 experts: the nearest legal size is 2"),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, {}, "need sequence_parallel"),
        ({"tensor_model_parallel_size": 64, "sequence_parallel": True}, {}, "does not divide"),
        ({}, {"num_experts_per_tok": 1}, "the router would not train"),
        ({}, {"attention_bias": True}, "attention_bias = true: not implemented"),
        ({"pipeline_model_parallel_size": 8}, {}, "more than the 4 layers"),
    ],
)
def test_refusals_name_the_reason(parallel, changes, match, experts):
    hf: Any = type(experts.config).from_pretrained(experts.folder)
    for name, value in changes.items():
        setattr(hf.text_config, name, value)
    with pytest.raises(ValueError, match=match):
        build_configs(hf, ParallelSection.model_validate(parallel), torch.float32)


def test_expert_parallelism_of_a_dense_model_is_refused(dense):
    with pytest.raises(ValueError, match="no experts"):
        build_configs(dense.config, ParallelSection(expert_model_parallel_size=2), torch.float32)
