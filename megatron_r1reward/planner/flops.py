"""Floating-point operations of the forward pass; a multiplication and an addition count as two.

Training needs three times these (forward, gradients of inputs, gradients of weights): the definition behind MFU.
Recomputation adds work but no model FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_r1reward.model_folder.shape import ModelShape, TextShape, VisionShape
from megatron_r1reward.planner.parameters import active_per_token


def language(text: TextShape, layers: Iterable[int], *, tokens: float, length: float) -> float:
    """`tokens` tokens in sequences of `length` through these decoder layers. Causal attention: each token meets half of
    its sequence, once for the scores and once for the values."""
    layers = tuple(layers)
    scores = 2 * text.query * length * tokens * len(layers)
    return 2 * active_per_token(text, layers) * tokens + scores


def head(text: TextShape, rows: float) -> float:
    """The LM head on `rows` response tokens."""
    return 2 * text.vocab * text.hidden * rows


def vision(tower: VisionShape, *, patches: float, frame: float) -> float:
    """`patches` patches in frames of `frame` through the tower and its mergers."""
    block = 2 * (4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.ffn)
    window = min(tower.window_patches or frame, frame)
    windowed = tower.blocks - tower.full_attention_blocks
    scores = 4 * tower.hidden * (tower.full_attention_blocks * frame + windowed * window)
    wide = tower.hidden * tower.unit
    merger = 2 * (wide**2 + wide * tower.out) / tower.unit * (1 + tower.deepstack)
    embed = 2 * tower.patch_values * tower.hidden
    return patches * (block * tower.blocks + scores + merger + embed)


def sequence_forward(shape: ModelShape, *, tokens: float, patches: float, frame: float, responses: float) -> float:
    """One sequence of `tokens` tokens with its images, and the head on its response."""
    return (
        language(shape.text, range(shape.text.layers), tokens=tokens, length=tokens)
        + vision(shape.vision, patches=patches, frame=frame)
        + head(shape.text, responses)
    )
