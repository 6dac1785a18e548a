"""What follows the hidden states: the LM head as a module that returns log-probs of targets, or the policy loss itself,
instead of logits; and in its place, where a model says rewards, the scalar head: one value per hidden state."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1reward.kernels.choose_kernel import choose, request_for
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput, linear_policy_loss
from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions, TokenInputs
from megatron_r1reward.model_folder.scalar_folder import scalar_architecture
from megatron_r1reward.model_folder.weight_table import SCORE, Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LossRequest:
    """Asks a model's last chunk for the policy loss of a micro-batch, formed in the LM head, instead of log-probs."""

    inputs: TokenInputs  # one entry per response token of the micro-batch
    options: PolicyLossOptions


class ResponseHead(ColumnParallelLinear):
    """megatron-core's output layer, applied to response rows.

    It has to be *called*: overlapped parameter gathers complete in a hook before a module's forward, and a weight that
    is only read could still be last step's.
    """

    options = HeadOptions()

    def forward(
        self,
        rows_RH: torch.Tensor,
        targets_R: torch.Tensor,
        weight: torch.Tensor | None = None,
        request: LossRequest | None = None,
    ) -> torch.Tensor | PolicyLossOutput:
        """Log-probs and entropies, float32 [2, R], or what `request` asks for; `weight` is the embedding's when that is
        tied and lives here."""
        head = self.weight if weight is None else weight
        if request is None:
            both = linear_log_probs(rows_RH, head, targets_R, tensor_parallel_group=self.tp_group, options=self.options)
            return torch.stack(both)
        return linear_policy_loss(
            rows_RH,
            head,
            request.inputs,
            request.options,
            tensor_parallel_group=self.tp_group,
            head_options=self.options,
        )


def use_response_head(model: GPTModel, *, vocab_size: int) -> None:
    """Turn the output layer that a last stage has built into a `ResponseHead`; parameters stay what they are.
    `vocab_size`: rows of the whole head that are no padding."""
    assert type(model.output_layer) is ColumnParallelLinear
    model.output_layer.__class__ = ResponseHead
    model.output_layer.options = HeadOptions(vocab_size=vocab_size)


def configure_heads(
    model: torch.nn.Module,
    options: HeadOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    loss: PolicyLossOptions | None = None,
) -> None:
    """Give the LM head of a model chunk its numerics, choose its kernels, and log which these are and why.

    Args:
        device, dtype: where the model runs, and in what; a head that is tied has no weight of its own to tell.
        loss: what an update forms in the head; None: log-probs only.

    Raises:
        ValueError: the kernels asked for cannot run on this device; the message says why.
    """
    for module in model.modules():
        if not isinstance(module, ResponseHead):
            continue
        reduce = not module.config.sequence_parallel  # else the gathering of the rows does it
        vocab_size = module.options.vocab_size
        module.options = replace(options, reduce_hidden_gradient=reduce, vocab_size=vocab_size)
        for what, given in {"log-probs": None, "policy loss": loss}.items():
            if what == "policy loss" and given is None:
                continue
            request = request_for(
                device,
                dtype=options.logits_dtype or dtype,
                columns=module.output_size_per_partition,
                tensor_parallel_size=module.tp_group.size(),
                padded=vocab_size is not None and vocab_size % module.tp_group.size() > 0,
                options=given,
            )
            choice = choose(request, requested=options.implementation)
            log.info("LM head: %s run in %r on %s logits: %s", what, choice.name, request.dtype, choice.reason)


class _Float32Linear(torch.nn.Linear):
    """A linear that computes in float32 whatever its parameters' dtype: a reward in bfloat16 has 8 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class ScalarHead(MegatronModule):
    """Hidden states to values. Every tensor-parallel rank holds it whole and computes the same.

    A reward model reads it at the last token of a sequence, a critic at every token of a response. Where it is read is
    the batch's matter (`Packer.last_token_only`).

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
