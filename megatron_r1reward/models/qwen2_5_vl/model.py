"""Qwen2.5-VL: vision tower and megatron-core GPTModel, from packed tokens and pixels to response log-probs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.models.qwen2_5_vl.config import ModelConfigs
from megatron_r1reward.models.qwen2_5_vl.rotary import PackedMultimodalRotary
from megatron_r1reward.models.qwen2_5_vl.vision import VisionTower
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.parallel.specs import TorchNorm, layer_spec, packed
from megatron_r1reward.types import PackedBatch


class HeadlessGPT(GPTModel):
    """GPTModel that ends with the final norm: the LM head is applied later, to response rows only."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def _language_model(configs: ModelConfigs, topology: Topology) -> HeadlessGPT:
    text = configs.hf.text_config
    layers = configs.language.num_layers // topology.pipeline_parallel_size
    model = HeadlessGPT(
        configs.language,
        TransformerBlockSubmodules(layer_specs=[layer_spec(AttnMaskType.causal)] * layers, layer_norm=TorchNorm),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=configs.hf.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=int(text.rope_parameters["rope_theta"]),
        scatter_embedding_sequence_parallel=False,  # image embeddings are merged in first
    )
    model.rotary_pos_emb = PackedMultimodalRotary(
        kv_channels=configs.language.kv_channels,
        rotary_percent=1.0,
        rotary_base=int(text.rope_parameters["rope_theta"]),
    )
    return model


class Qwen25VL(MegatronModule):
    """One pipeline stage of Qwen2.5-VL. The first stage holds the vision tower and the embedding."""

    def __init__(self, configs: ModelConfigs, topology: Topology) -> None:
        super().__init__(config=configs.language)
        self.hf = configs.hf
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.is_first_stage, topology.is_last_stage
        self.share_embeddings_and_output_weights = configs.hf.tie_word_embeddings
        self.language_model = _language_model(configs, topology)
        self.vision = VisionTower(configs, topology) if self.pre_process else None
        self.tensor_parallel_group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's pipeline schedule with the previous stage's output."""
        self.language_model.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> torch.nn.Module:
        return self.language_model.decoder

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        """Token embeddings with image embeddings at the image placeholders: [T, 1, H] (or a 1/tp slice of it)."""
        embedding_T1H = self.language_model.embedding(input_ids=batch.input_ids, position_ids=None)
        if batch.pixel_values is not None:
            assert self.vision is not None and batch.image_grid_thw is not None
            images_MH = self.vision(batch.pixel_values, batch.image_grid_thw)
            is_image_T11 = (batch.input_ids == self.hf.image_token_id).transpose(0, 1)[..., None]
            placeholders = int(is_image_T11.sum())
            if placeholders != images_MH.shape[0]:
                raise ValueError(f"{placeholders} image tokens in the batch, but its images have {images_MH.shape[0]}")
            embedding_T1H = embedding_T1H.masked_scatter(is_image_T11, images_MH.to(embedding_T1H.dtype))
        if self.config.sequence_parallel:
            embedding_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedding_T1H)
        return embedding_T1H

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The last stage returns float32 [2, R]: log-probs of the response tokens and the entropies of their
        distributions. Other stages return hidden states for the next one."""
        hidden_T1H = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids,
            attention_mask=None,
            decoder_input=self._embed(batch) if self.pre_process else None,
            packed_seq_params=packed(batch.cu_seqlens),
        )
        if not self.post_process:
            return hidden_T1H
        if self.config.sequence_parallel:
            # linear_log_probs all-reduces the hidden gradient itself, so every rank already holds all of it.
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_T1H, tensor_parallel_output_grad=False
            )
        rows_RH = hidden_T1H[:, 0][batch.response_positions]
        head = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.language_model.output_layer.weight
        )
        log_probs_R, entropy_R = linear_log_probs(
            rows_RH, head, batch.targets, tensor_parallel_group=self.tensor_parallel_group
        )
        return torch.stack([log_probs_R, entropy_R])
