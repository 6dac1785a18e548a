"""Qwen3-VL: vision tower and megatron-core GPTModel, from packed tokens and pixels to response log-probs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.models.qwen2_5_vl.model import HeadlessGPT
from megatron_r1reward.models.qwen3_vl.config import ModelConfigs, deepstack_levels, moe_layers
from megatron_r1reward.models.qwen3_vl.layers import DecoderSeqParams, decoder_layer_spec
from megatron_r1reward.models.qwen3_vl.rotary import InterleavedMultimodalRotary
from megatron_r1reward.models.qwen3_vl.vision import VisionTower
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.parallel.specs import TorchNorm, packed
from megatron_r1reward.types import PackedBatch


def _language_model(configs: ModelConfigs, topology: Topology) -> HeadlessGPT:
    text = configs.hf.text_config
    first = get_transformer_layer_offset(configs.language)
    experts = moe_layers(configs.hf)[first : first + get_num_layers_to_build(configs.language)]
    theta = int(text.rope_parameters["rope_theta"])
    model = HeadlessGPT(
        configs.language,
        TransformerBlockSubmodules(
            layer_specs=[decoder_layer_spec(experts=is_moe) for is_moe in experts], layer_norm=TorchNorm
        ),
        vocab_size=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=configs.hf.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_base=theta,
        scatter_embedding_sequence_parallel=False,  # image embeddings are merged in first
    )
    model.rotary_pos_emb = InterleavedMultimodalRotary(
        kv_channels=configs.language.kv_channels, rotary_percent=1.0, rotary_base=theta
    )
    return model


class Qwen3VL(MegatronModule):
    """One pipeline stage of Qwen3-VL. The first stage holds the vision tower and the embedding.

    Deepstack features of decoder layers on later stages travel to them below the hidden states, as further rows; the
    stages tell them apart by the number of tokens in the batch.
    """

    def __init__(self, configs: ModelConfigs, topology: Topology) -> None:
        super().__init__(config=configs.language)
        self.hf = configs.hf
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.is_first_stage, topology.is_last_stage
        self.share_embeddings_and_output_weights = configs.hf.tie_word_embeddings
        self.language_model = _language_model(configs, topology)
        self.vision = VisionTower(configs, topology) if self.pre_process else None
        self.tensor_parallel_group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        self.first_layer = get_transformer_layer_offset(configs.language)
        self.num_layers = get_num_layers_to_build(configs.language)
        self.levels = deepstack_levels(configs.hf)
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's pipeline schedule with the previous stage's output."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def decoder(self) -> torch.nn.Module:
        return self.language_model.decoder

    def _is_visual(self, batch: PackedBatch) -> torch.Tensor:
        """bool [T]: image and video placeholders."""
        ids_T = batch.input_ids[0]
        return (ids_T == self.hf.image_token_id) | (ids_T == self.hf.video_token_id)

    def _local_rows(self, batch: PackedBatch) -> slice:
        """The rows of the batch whose hidden states are on this rank."""
        if not self.config.sequence_parallel:
            return slice(0, batch.num_tokens)
        local = batch.num_tokens // self.tensor_parallel_group.size()
        return slice(self.tensor_parallel_group.rank() * local, (self.tensor_parallel_group.rank() + 1) * local)

    def _embed(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings with image embeddings at the image placeholders, [T, 1, H], and deepstack features
        [K, V, H] for the V image tokens among this rank's rows (None without images). T is this rank's share."""
        embedding_T1H = self.language_model.embedding(input_ids=batch.input_ids, position_ids=None)
        features_KVH = None
        if batch.pixel_values is not None:
            assert self.vision is not None and batch.image_grid_thw is not None
            visual_T = self._is_visual(batch)
            features_MLH = self.vision(batch.pixel_values, batch.image_grid_thw).to(embedding_T1H.dtype)
            if int(visual_T.sum()) != features_MLH.shape[0]:
                raise ValueError(
                    f"{int(visual_T.sum())} image tokens in the batch, but its images have {features_MLH.shape[0]}"
                )
            embedding_T1H = embedding_T1H.masked_scatter(visual_T[:, None, None], features_MLH[:, 0])
            if self.config.sequence_parallel:
                # Each rank back-propagates through its own rows only: their gradients have to be summed.
                features_MLH = tensor_parallel.copy_to_tensor_model_parallel_region(features_MLH)
            number_T = visual_T.cumsum(0) - 1
            local = self._local_rows(batch)
            features_KVH = features_MLH[number_T[local][visual_T[local]], 1:].transpose(0, 1)
        if self.config.sequence_parallel:
            embedding_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedding_T1H)
        return embedding_T1H, features_KVH

    def _receive(self, batch: PackedBatch, visual_rows_V: torch.Tensor) -> torch.Tensor | None:
        """Split what the previous stage sent: hidden states for the decoder, deepstack features [K, V, H]."""
        assert self._received is not None
        local = self._local_rows(batch)
        tokens = local.stop - local.start
        self.language_model.set_input_tensor(self._received[:tokens])
        features = self._received[tokens:]
        return features.reshape(-1, len(visual_rows_V), features.shape[-1]) if features.shape[0] else None

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The last stage returns float32 [2, R]: log-probs of the response tokens and the entropies of their
        distributions. Other stages return hidden states for the next one."""
        visual_rows_V = self._is_visual(batch)[self._local_rows(batch)].nonzero()[:, 0]
        if self.pre_process:
            embedding_T1H, features_KVH = self._embed(batch)
        else:
            embedding_T1H, features_KVH = None, self._receive(batch, visual_rows_V)
        sequences = packed(batch.cu_seqlens)
        hidden_T1H = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids,
            attention_mask=None,
            decoder_input=embedding_T1H,
            packed_seq_params=DecoderSeqParams(
                **vars(sequences), visual_rows=visual_rows_V, first_level=self.first_layer
            ),
            extra_block_kwargs={"context": features_KVH},
        )
        if not self.post_process:
            later = max(self.levels - self.first_layer - self.num_layers, 0)
            if later and features_KVH is not None:
                hidden_T1H = torch.cat([hidden_T1H, features_KVH[-later:].flatten(0, 1)[:, None]])
            return hidden_T1H
        return self._log_probs(hidden_T1H, batch)

    def _log_probs(self, hidden_T1H: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
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
