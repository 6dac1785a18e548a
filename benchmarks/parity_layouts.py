"""The layouts that are compared with a single process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PLAIN = {"use_distributed_optimizer": False}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 20_000}
SHARDED = {"vision": "image_sharded"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout by name. The distributed optimizer is on unless `parallel` says otherwise."""

    ranks: int
    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    needs_experts: bool = False


SINGLE = Layout(ranks=1, parallel={"use_distributed_optimizer": False})
LAYOUTS: dict[str, Layout] = {
    "TP2": Layout(ranks=2, parallel=TP2),
    "TP2+SP": Layout(ranks=2, parallel=TP2 | SP),
    "PP2": Layout(ranks=2, parallel=PP2),
    "PP2 VPP2": Layout(ranks=2, parallel=VPP2),
    "PP2 vision balanced": Layout(ranks=2, parallel=PP2 | {"vision_placement": "balanced"}),
    "PP2 vision own stage": Layout(ranks=2, parallel=PP2 | {"vision_placement": "own_stage"}),
    "PP2 VPP2 vision own stage": Layout(ranks=2, parallel=VPP2 | {"vision_placement": "own_stage"}),
    "CP2": Layout(ranks=2, parallel=CP2),
    "DP2": Layout(ranks=2, parallel=PLAIN),
    "DP2 distributed optimizer": Layout(ranks=2, parallel={}),
    "DP2 distributed optimizer, overlap": Layout(ranks=2, parallel=OVERLAP),
    "TP2 images sharded": Layout(ranks=2, parallel=TP2 | SHARDED),
    "CP2 images sharded": Layout(ranks=2, parallel=CP2 | SHARDED),
    "TP2 full recompute": Layout(ranks=2, parallel=TP2 | {"recompute": "full", "recompute_vision": True}),
    "CP2 selective recompute": Layout(ranks=2, parallel=CP2 | {"recompute": "selective"}),
    "EP2": Layout(ranks=2, parallel=EP2, needs_experts=True),
    "EP2 overlap": Layout(ranks=2, parallel=EP2 | OVERLAP, needs_experts=True),
    "TP2xPP2": Layout(ranks=4, parallel=TP2 | PP2),
    "TP2+SPxEP2": Layout(ranks=2, parallel=TP2 | SP | EP2, needs_experts=True),
    "EP2xPP2 VPP2": Layout(ranks=4, parallel=EP2 | VPP2, needs_experts=True),
    "TP2xCP2": Layout(ranks=4, parallel=TP2 | CP2),
    "TP2xDP2": Layout(ranks=4, parallel=TP2),
    "TP2xCP2+SP images sharded": Layout(ranks=4, parallel=TP2 | CP2 | SP | SHARDED),
    "CP2xPP2 VPP2": Layout(ranks=4, parallel=CP2 | VPP2),
    "TP2+SPxPP2 VPP2": Layout(ranks=4, parallel=TP2 | SP | VPP2),
    "CP2xDP2 overlap": Layout(ranks=4, parallel=CP2 | OVERLAP),
    "PP2 VPP2xDP2 overlap": Layout(ranks=4, parallel=VPP2 | OVERLAP),
}
