"""Qwen2.5-VL: vision tower and megatron-core GPTModel, from packed tokens and pixels to response log-probs."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_r1reward.cluster.legality import padded_vocabulary
from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput
from megatron_r1reward.models.base import HeadlessGPT, VisionLanguageModel, is_tied, place_images
from megatron_r1reward.models.head import LossRequest, use_response_head, use_scalar_head
from megatron_r1reward.models.qwen2_5_vl.config import ModelConfigs
from megatron_r1reward.models.qwen2_5_vl.rotary import PackedMultimodalRotary, rotary_frequencies
from megatron_r1reward.models.qwen2_5_vl.vision import VisionTower
from megatron_r1reward.parallel.context import ContextSplit, split_context
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.parallel.specs import final_norm, layer_spec, packed
from megatron_r1reward.types import PackedBatch


def _language_model(configs: ModelConfigs, topology: Topology, chunk: int) -> HeadlessGPT:
    text = configs.hf.text_config
    layers = configs.chunk_layers[chunk * topology.pipeline_parallel_size + topology.pipeline_parallel_rank]
    spec = layer_spec(AttnMaskType.causal, transformer_impl=configs.transformer_impl)
    model = HeadlessGPT(
        configs.language,
        TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=final_norm(configs.transformer_impl)),
        vocab_size=padded_vocabulary(text.vocab_size, configs.parallel),
        max_sequence_length=text.max_position_embeddings,
        pre_process=topology.holds_first_layer(chunk),
        post_process=topology.holds_last_layer(chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=is_tied(configs.hf, configs.shape),
        position_embedding_type="mrope",
        rotary_base=configs.shape.text.rope.theta,
        scatter_embedding_sequence_parallel=False,  # image embeddings are merged in first
        vp_stage=chunk if topology.virtual_pipeline_parallel_size > 1 else None,
    )
    model.rotary_pos_emb = PackedMultimodalRotary(
        kv_channels=configs.language.kv_channels, rotary_percent=1.0, rotary_base=configs.shape.text.rope.theta
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(configs.hf.text_config, model.rotary_pos_emb.inv_freq)
    if model.post_process and configs.shape.score_layers:
        use_scalar_head(model, layers=configs.shape.score_layers)
    elif model.post_process:
        use_response_head(model, vocab_size=text.vocab_size)
    return model


class Qwen25VL(VisionLanguageModel):
    """Model chunk `chunk` of one pipeline stage of Qwen2.5-VL. The first holds the vision tower and the embedding.

    Under context parallelism a rank embeds, transforms and predicts its share of the tokens (`parallel.context`);
    inputs are always whole micro-batches.
    """

    def __init__(self, configs: ModelConfigs, topology: Topology, chunk: int = 0) -> None:
        super().__init__(configs.hf, configs.shape, configs.language, topology, chunk)
        self.language_model = _language_model(configs, topology, chunk)
        self.vision = VisionTower(configs, topology) if self.pre_process else None

    def _embed(self, batch: PackedBatch, split: ContextSplit | None) -> torch.Tensor:
        """Token embeddings with image embeddings at the image placeholders: [T, 1, H] (or a rank's share of T)."""
        assert self.vision is not None
        input_ids = batch.input_ids if split is None else batch.input_ids[:, split.positions]
        embedding_T1H = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        if batch.pixel_values is not None:
            assert batch.image_grid_thw is not None
            images_MH = self.vision(batch.pixel_values, batch.image_grid_thw)
            placeholders = (self.hf.image_token_id, self.hf.video_token_id)
            embedding_T1H = place_images(embedding_T1H, images_MH, batch, split, placeholders=placeholders)
        elif self.vision.sharding.run_without_images and torch.is_grad_enabled():
            embedding_T1H = embedding_T1H + self.vision.nothing()
        if self.config.sequence_parallel:
            embedding_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedding_T1H)
        return embedding_T1H

    def forward(self, batch: PackedBatch, request: LossRequest | None = None) -> torch.Tensor | PolicyLossOutput:
        """The last chunk returns float32 [2, R]: log-probs of the response tokens and the entropies of their
        distributions, on every context-parallel rank; or the policy loss that `request` asks for; or a scalar head's
        values, [1, R]. Other chunks return hidden states for the next one."""
        split = split_context(batch.bounds, self.context_parallel_group, batch.input_ids.device)
        hidden_T1H = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids if split is None else batch.position_ids[..., split.positions],
            attention_mask=None,
            decoder_input=self._embed(batch, split) if self.pre_process else None,
            packed_seq_params=packed(batch.cu_seqlens, batch.bounds, split),
        )
        return self.output(hidden_T1H, batch, split, request) if self.post_process else hidden_T1H
