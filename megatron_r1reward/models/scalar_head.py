"""The scalar head: one value per hidden state, in the place of the LM head.

A reward model reads it at the last token of a sequence; a critic would at every token of a response. Where it is read
is the batch's matter (`Packer.last_token_only`).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1reward.model_folder.scalar_folder import scalar_architecture
from megatron_r1reward.model_folder.weight_table import SCORE, Entry


class _Float32Linear(torch.nn.Linear):
    """A linear that computes in float32 whatever its parameters' dtype: a reward in bfloat16 has 8 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class ScalarHead(MegatronModule):
    """Hidden states to values. Every tensor-parallel rank holds it whole and computes the same.

    Its linears are called, not only read: overlapped parameter gathers complete in a hook before a module's forward.
    """

    def __init__(self, config: TransformerConfig, *, layers: int) -> None:
        super().__init__(config=config)
        hidden = config.hidden_size
        self.score: torch.nn.Module
        if layers == 1:
            self.score = _Float32Linear(hidden, 1, bias=False)
        else:
            self.score = torch.nn.Sequential(_Float32Linear(hidden, hidden), torch.nn.ReLU(), _Float32Linear(hidden, 1))

    def forward(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Values, float32 [R], of hidden states [R, H]."""
        values_R1: torch.Tensor = self.score(rows_RH)
        return values_R1[:, 0]


def use_scalar_head(model: GPTModel, *, layers: int) -> None:
    """Put a scalar head in the place of the output layer that a last stage has built."""
    model.output_layer = ScalarHead(model.config, layers=layers)


def with_head(hf: Any, layers: int) -> Any:
    """A loaded Hugging Face configuration, changed into that of the same model with a scalar head; with 0 layers, as it
    is."""
    if layers:
        hf.architectures = [scalar_architecture(name) for name in hf.architectures]
        hf.id2label, hf.label2id, hf.score_layers = {0: "reward"}, {"reward": 0}, layers
    return hf


def fresh_score(entry: Entry, *, seed: int) -> torch.Tensor:
    """First values of a parameter of a new scalar head, float32, the same in every layout.

    The last layer is drawn with a standard deviation of 1 / (H + 1), so that rewards begin near 0 and the loss at
    log 2; the layer before it with 1 / sqrt(H). Biases are 0.
    """
    assert entry.megatron.startswith(SCORE), f"{entry.megatron} is no part of a scalar head"
    (shape,) = entry.shapes
    if entry.megatron.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{entry.megatron}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    hidden = shape[1]
    deviation = 1.0 / (hidden + 1) if shape[0] == 1 else hidden**-0.5
    return torch.randn(shape, generator=generator) * deviation
