"""Scalar reward models inside vLLM: our families with a reward head in the place of the LM head (`vllm_plugin`).

vLLM's own adapter reads a linear head from the module that holds the texts' layers; ours stands beside it, is 1 or 2
layers deep, and computes in float32 like the trainer's (`models.head.ScalarHead`). The pooler is vLLM's: the hidden
state of the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models.adapters import as_seq_cls_model
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration


class _RewardHead:
    """What a model's pooler applies to hidden states [B, H]: rewards, float32 [B, 1]."""

    def _init_pooler(self, vllm_config: VllmConfig, prefix: str = "") -> Any:
        model = vllm_config.model_config
        hidden, dtype = model.get_hidden_size(), model.head_dtype
        self.score: torch.nn.Module
        if getattr(model.hf_config, "score_layers", 1) == 1:
            self.score = torch.nn.Linear(hidden, 1, bias=False, dtype=dtype)
        else:
            first, last = torch.nn.Linear(hidden, hidden, dtype=dtype), torch.nn.Linear(hidden, 1, dtype=dtype)
            self.score = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        return DispatchPooler.for_seq_cls(model.pooler_config, classifier=self.score)


class Qwen2_5_VLForSequenceClassification(_RewardHead, as_seq_cls_model(Qwen2_5_VLForConditionalGeneration)):  # type: ignore[misc]  # noqa: N801
    """Qwen2.5-VL."""


class Qwen3VLForSequenceClassification(_RewardHead, as_seq_cls_model(Qwen3VLForConditionalGeneration)):  # type: ignore[misc]
    """Qwen3-VL."""


class Qwen3VLMoeForSequenceClassification(_RewardHead, as_seq_cls_model(Qwen3VLMoeForConditionalGeneration)):  # type: ignore[misc]
    """Qwen3-VL with experts."""
