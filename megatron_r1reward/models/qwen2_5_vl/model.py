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

from megatron_r1reward.models.head import use_response_head
from megatron_r1reward.models.images import place_images
from megatron_r1reward.models.qwen2_5_vl.config import ModelConfigs
from megatron_r1reward.models.qwen2_5_vl.rotary import PackedMultimodalRotary
from megatron_r1reward.models.qwen2_5_vl.vision import VisionTower
from megatron_r1reward.parallel.context import ContextSplit, split_context
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.parallel.specs import final_norm, layer_spec, packed
from megatron_r1reward.types import PackedBatch


class HeadlessGPT(GPTModel):
    """GPTModel that ends with the final norm: the LM head is applied later, to response rows only."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def _language_model(configs: ModelConfigs, topology: Topology, chunk: int) -> HeadlessGPT:
    text = configs.hf.text_config
    layers = configs.chunk_layers[chunk * topology.pipeline_parallel_size + topology.pipeline_parallel_rank]
    spec = layer_spec(AttnMaskType.causal, transformer_impl=configs.transformer_impl)
    model = HeadlessGPT(
        configs.language,
        TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=final_norm(configs.transformer_impl)),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=topology.holds_first_layer(chunk),
        post_process=topology.holds_last_layer(chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=configs.hf.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=int(text.rope_parameters["rope_theta"]),
        scatter_embedding_sequence_parallel=False,  # image embeddings are merged in first
        vp_stage=chunk if topology.virtual_pipeline_parallel_size > 1 else None,
    )
    model.rotary_pos_emb = PackedMultimodalRotary(
        kv_channels=configs.language.kv_channels,
        rotary_percent=1.0,
        rotary_base=int(text.rope_parameters["rope_theta"]),
    )
    if model.post_process:
        use_response_head(model)
    return model


class Qwen25VL(MegatronModule):
    """Model chunk `chunk` of one pipeline stage of Qwen2.5-VL. The first holds the vision tower and the embedding.

    Under context parallelism a rank embeds, transforms and predicts its share of the tokens (`parallel.context`);
    inputs are always whole micro-batches.
    """

    def __init__(self, configs: ModelConfigs, topology: Topology, chunk: int = 0) -> None:
        super().__init__(config=configs.language)
        self.hf = configs.hf
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.holds_first_layer(chunk), topology.holds_last_layer(chunk)
        self.vp_stage = chunk if topology.virtual_pipeline_parallel_size > 1 else None
        self.share_embeddings_and_output_weights = configs.hf.tie_word_embeddings
        self.language_model = _language_model(configs, topology, chunk)
        self.vision = VisionTower(configs, topology) if self.pre_process else None
        self.context_parallel_group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"]).cp

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's pipeline schedule with the previous stage's output."""
        self.language_model.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> torch.nn.Module:
        return self.language_model.decoder

    def _embed(self, batch: PackedBatch, split: ContextSplit | None) -> torch.Tensor:
        """Token embeddings with image embeddings at the image placeholders: [T, 1, H] (or a rank's share of T)."""
        assert self.vision is not None
        input_ids = batch.input_ids if split is None else batch.input_ids[:, split.positions]
        embedding_T1H = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        if batch.pixel_values is not None:
            assert batch.image_grid_thw is not None
            images_MH = self.vision(batch.pixel_values, batch.image_grid_thw)
            embedding_T1H = place_images(embedding_T1H, images_MH, batch, split, image_token_id=self.hf.image_token_id)
        elif self.vision.sharding.run_without_images and torch.is_grad_enabled():
            embedding_T1H = embedding_T1H + self.vision.nothing()
        if self.config.sequence_parallel:
            embedding_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedding_T1H)
        return embedding_T1H

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The last chunk returns float32 [2, R]: log-probs of the response tokens and the entropies of their
        distributions, on every context-parallel rank. Other chunks return hidden states for the next one."""
        split = split_context(batch.cu_seqlens, self.context_parallel_group)
        hidden_T1H = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids,
            attention_mask=None,
            decoder_input=self._embed(batch, split) if self.pre_process else None,
            packed_seq_params=packed(batch.cu_seqlens),
        )
        if not self.post_process:
            return hidden_T1H
        if self.config.sequence_parallel:
            # linear_log_probs all-reduces the hidden gradient itself, so every rank already holds all of it.
            hidden_T1H = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_T1H, tensor_parallel_output_grad=False
            )
        return self._log_probs(hidden_T1H[:, 0], batch, split)

    def _log_probs(self, hidden_TH: torch.Tensor, batch: PackedBatch, split: ContextSplit | None) -> torch.Tensor:
        rows_R, targets_R = batch.response_positions, batch.targets
        if split is not None:
            here_A, rows_R = split.rows(rows_R)
            targets_R = targets_R[here_A]
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        output_2R = self.language_model.output_layer(hidden_TH[rows_R], targets_R, weight)
        return output_2R if split is None else split.collect(output_2R, here_A, batch.targets.numel())
