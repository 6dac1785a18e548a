"""What the families' models have in common: the interface to megatron-core's schedules, and the end of the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput
from megatron_r1reward.kernels.lm_head import gather_sequence_parallel_rows
from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.models.head import LossRequest, ScalarHead
from megatron_r1reward.parallel.context import ContextSplit
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.types import PackedBatch


class HeadlessGPT(GPTModel):
    """GPTModel that ends with the final norm: the LM head is applied later, to response rows only."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core looks for the LM head's weight, which a scalar head does not have."""
        if isinstance(getattr(self, "output_layer", None), ScalarHead):
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


class VisionLanguageModel(MegatronModule):
    """Model chunk `chunk` of one pipeline stage. A family sets `language_model` and `vision` (None on chunks without
    the tower) and writes the forward."""

    language_model: HeadlessGPT
    vision: Any

    def __init__(self, hf: Any, shape: ModelShape, language: TransformerConfig, topology: Topology, chunk: int) -> None:
        super().__init__(config=language)
        self.hf = hf
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.holds_first_layer(chunk), topology.holds_last_layer(chunk)
        self.vp_stage = chunk if topology.virtual_pipeline_parallel_size > 1 else None
        self.score_layers = shape.score_layers
        self.share_embeddings_and_output_weights = is_tied(hf, shape)
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp", "tp"])
        self.context_parallel_group, self.tensor_parallel_group = groups.cp, groups.tp

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's pipeline schedule with the previous stage's output."""
        self.language_model.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> torch.nn.Module:
        return self.language_model.decoder

    def output(
        self, hidden_T1H: torch.Tensor, batch: PackedBatch, split: ContextSplit | None, request: LossRequest | None
    ) -> torch.Tensor | PolicyLossOutput:
        """What the last chunk returns: `response_output`, or `values` where it has a scalar head."""
        if not self.score_layers:
            return self.response_output(hidden_T1H, batch, split, request)
        assert request is None, "a scalar head forms no policy loss"
        return self.values(hidden_T1H, batch, split)

    def values(self, hidden_T1H: torch.Tensor, batch: PackedBatch, split: ContextSplit | None) -> torch.Tensor:
        """The scalar head at `batch.response_positions`: float32 [1, R], on every rank of a replica's last chunk."""
        rows_R, hidden_TH = batch.response_positions, hidden_T1H[:, 0]
        if split is not None:
            here_A, rows_R = split.rows(rows_R)
        if self.config.sequence_parallel:  # every rank computes the same of them, so their gradients are whole
            hidden_RH = gather_sequence_parallel_rows(
                hidden_TH, rows_R, self.tensor_parallel_group, partial_gradients=False
            )
        else:
            hidden_RH = hidden_TH[rows_R]
        values_1R = self.language_model.output_layer(hidden_RH)[None]
        return values_1R if split is None else split.collect(values_1R, here_A, batch.targets.numel())

    def response_output(
        self, hidden_T1H: torch.Tensor, batch: PackedBatch, split: ContextSplit | None, request: LossRequest | None
    ) -> torch.Tensor | PolicyLossOutput:
        """Log-probs and entropies of the response tokens, float32 [2, R], on every rank of a replica's last chunk.

        With a `request` the policy loss of these tokens: under context parallelism `total` sums the rows of this rank
        only, the tensors per row are those of all ranks.
        """
        rows_R, targets_R = batch.response_positions, batch.targets
        if split is not None:
            here_A, rows_R = split.rows(rows_R)
            targets_R = targets_R[here_A]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if request is not None and split is not None:
            request = replace(request, inputs=request.inputs.take(here_A))
        hidden_TH, head = hidden_T1H[:, 0], self.language_model.output_layer
        if self.config.sequence_parallel:  # only the rows that are needed travel
            hidden_RH = gather_sequence_parallel_rows(hidden_TH, rows_R, head.tp_group)
        else:
            hidden_RH = hidden_TH[rows_R]
        output = head(hidden_RH, targets_R, weight, request)
        if split is None:
            return output
        if request is None:
            return split.collect(output, here_A, batch.targets.numel())
        rows_4A = torch.stack([output.log_probs, output.entropy, output.loss, output.flags.float()])
        log_probs_R, entropy_R, loss_R, flags_R = split.collect(rows_4A, here_A, batch.targets.numel())
        return replace(output, log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, flags=flags_R.int())


def is_tied(hf: Any, shape: ModelShape) -> bool:
    """Whether the LM head is the embedding."""
    return bool(hf.tie_word_embeddings) and not shape.score_layers


def on_device(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model, moved to the device, with parameters of `dtype`.

    megatron-core builds norms, rotary frequencies and routers on the CPU, and routers in float32. Its own wrapper for
    16 bit rounds buffers as well: rotary frequencies would be wrong by 0.2 rad within a picture. FP8 parameters, which
    say that they are of `dtype`, are left alone: a conversion would quantize them again.
    """
    model.to(device)
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model


def place_images(
    embedding_T1H: torch.Tensor,
    images_MH: torch.Tensor,
    batch: PackedBatch,
    split: ContextSplit | None,
    *,
    placeholders: tuple[int, ...],
) -> torch.Tensor:
    """Replace the embeddings of image (and video) placeholders by the images' embeddings.

    Args:
        embedding_T1H: embeddings of this context-parallel rank's tokens.
        images_MH: embeddings of the batch's distinct images, in order.
        split: this rank's share of the row; None: all of it.
        placeholders: token ids that stand for images and video frames.

    Raises:
        ValueError: the placeholders are not as many as the images' tokens.
    """
    ids_T, rows_K = batch.input_ids[0], batch.image_rows
    is_image_T = torch.zeros_like(ids_T, dtype=torch.bool)
    for token_id in placeholders:
        is_image_T |= ids_T == token_id
    needed, available = int(is_image_T.sum()), images_MH.shape[0] if rows_K is None else len(rows_K)
    if needed != available:
        raise ValueError(f"{needed} image tokens in the batch, but its images have {available}")
    if split is not None:
        slot_T = is_image_T.cumsum(0) - 1  # which placeholder a position is
        is_image_T = is_image_T[split.positions]
        slot_K = slot_T[split.positions][is_image_T]
        rows_K = slot_K if rows_K is None else rows_K[slot_K]
    values_KH = images_MH if rows_K is None else images_MH.index_select(0, rows_K)
    return embedding_T1H.masked_scatter(is_image_T[:, None, None], values_KH.to(embedding_T1H.dtype))


class ModelChunks(torch.nn.ModuleList):
    """Several chunks of one rank. Saved and loaded together; megatron-core's schedules take them as a list."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Local names carry the chunk's number; the names in the checkpoint do not, so layouts are interchangeable."""
        return {
            f"{prefix}{number}.{name}": item
            for number, chunk in enumerate(self)
            for name, item in chunk.sharded_state_dict("", sharded_offsets, metadata).items()  # type: ignore[operator]
        }


def join_chunks(chunks: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """The one chunk itself, or all of them as one module."""
    return chunks[0] if len(chunks) == 1 else ModelChunks(chunks)


def chunks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The chunks of a model, in the order of the interleaved schedule."""
    return list(model) if isinstance(model, ModelChunks) else [model]
