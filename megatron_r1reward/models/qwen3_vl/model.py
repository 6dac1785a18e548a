"""Qwen3-VL: vision tower and megatron-core GPTModel, from packed tokens and pixels to response log-probs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_r1reward.cluster.legality import padded_vocabulary
from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput
from megatron_r1reward.models.base import HeadlessGPT, VisionLanguageModel, is_tied
from megatron_r1reward.models.head import LossRequest, use_response_head, use_scalar_head
from megatron_r1reward.models.qwen2_5_vl.rotary import rotary_frequencies
from megatron_r1reward.models.qwen3_vl.config import ModelConfigs
from megatron_r1reward.models.qwen3_vl.layers import DecoderRow, RouterBalance, decoder_layer_spec
from megatron_r1reward.models.qwen3_vl.rotary import InterleavedMultimodalRotary
from megatron_r1reward.models.qwen3_vl.vision import VisionTower
from megatron_r1reward.parallel.context import ContextSplit, split_context
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.parallel.specs import final_norm, packed
from megatron_r1reward.types import PackedBatch


def _language_model(configs: ModelConfigs, topology: Topology, chunk: int, layers: range) -> HeadlessGPT:
    text, impl = configs.shape.text, configs.transformer_impl
    experts = text.experts.count if text.experts is not None else 0
    specs = [
        decoder_layer_spec(num_experts=experts if text.is_sparse(layer) else 0, transformer_impl=impl)
        for layer in layers
    ]
    model = HeadlessGPT(
        configs.language,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=final_norm(impl)),
        vocab_size=padded_vocabulary(text.vocab, configs.parallel),
        max_sequence_length=text.max_positions,
        pre_process=topology.holds_first_layer(chunk),
        post_process=topology.holds_last_layer(chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=is_tied(configs.hf, configs.shape),
        position_embedding_type="mrope",
        rotary_base=text.rope.theta,
        scatter_embedding_sequence_parallel=False,  # image embeddings are merged in first
        vp_stage=chunk if topology.virtual_pipeline_parallel_size > 1 else None,
    )
    model.rotary_pos_emb = InterleavedMultimodalRotary(
        kv_channels=configs.language.kv_channels, rotary_percent=1.0, rotary_base=text.rope.theta
    )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(configs.hf.text_config, model.rotary_pos_emb.inv_freq)
    if model.post_process and configs.shape.score_layers:
        use_scalar_head(model, layers=configs.shape.score_layers)
    elif model.post_process:
        use_response_head(model, vocab_size=text.vocab)
    return model


def _balance(batch: PackedBatch, mine_T: torch.Tensor) -> RouterBalance:
    """A sequence ends with its response; what follows it up to the next sequence is padding."""
    starts_S, ends_S = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    of_response_R = torch.bucketize(batch.response_positions, ends_S, right=True)
    # The row of a response token is one after the row that predicts it. Sequences without a response are padding.
    after = 1 if batch.last_token_only else 2
    real_ends_S = starts_S.scatter_reduce(0, of_response_R, batch.response_positions + after, "amax")
    rows_T = torch.arange(batch.num_tokens, device=mine_T.device)
    sequence_T = torch.bucketize(rows_T, ends_S, right=True)
    real_T = rows_T < real_ends_S[sequence_T]
    return RouterBalance(real_rows=real_T[mine_T], real_tokens=int(real_T.sum()), loss_tokens=batch.targets.numel())


class Qwen3VL(VisionLanguageModel):
    """Model chunk `chunk` of one pipeline stage of Qwen3-VL. The first holds the vision tower and the embedding.

    Deepstack features of decoder layers in later chunks travel to them below the hidden states, as further rows; the
    chunks tell them apart by the number of tokens in the batch.
    """

    def __init__(self, configs: ModelConfigs, topology: Topology, chunk: int = 0) -> None:
        super().__init__(configs.hf, configs.shape, configs.language, topology, chunk)
        number = chunk * topology.pipeline_parallel_size + topology.pipeline_parallel_rank
        first = sum(configs.chunk_layers[:number])
        self.layers = range(first, first + configs.chunk_layers[number])
        self.language_model = _language_model(configs, topology, chunk, self.layers)
        self.vision = VisionTower(configs, topology) if self.pre_process else None
        self.levels = configs.shape.vision.deepstack
        self._received: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron-core's pipeline schedule with the previous stage's output."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _is_visual(self, batch: PackedBatch) -> torch.Tensor:
        """bool [T]: image and video placeholders of the whole row."""
        ids_T = batch.input_ids[0]
        return (ids_T == self.hf.image_token_id) | (ids_T == self.hf.video_token_id)

    def _share(self, positions_T: torch.Tensor) -> torch.Tensor:
        """Under sequence parallelism, this rank's part of the positions of a context-parallel rank."""
        if not self.config.sequence_parallel:
            return positions_T
        group = parallel_state.get_tensor_model_parallel_group()
        return positions_T.chunk(group.size())[group.rank()]

    def _embed(
        self, batch: PackedBatch, positions_T: torch.Tensor, visual_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings at `positions_T` of the row with image embeddings at the placeholders, [T, 1, H], and
        deepstack features [K, V, H] for the V placeholders among this rank's hidden states (None without images)."""
        assert self.vision is not None
        embedding_T1H = self.language_model.embedding(input_ids=batch.input_ids[:, positions_T], position_ids=None)
        features_KVH = None
        if batch.pixel_values is not None:
            assert batch.image_grid_thw is not None
            features_MLH = self.vision(batch.pixel_values, batch.image_grid_thw).to(embedding_T1H.dtype)
            rows = batch.image_rows
            if rows is None:
                rows = torch.arange(features_MLH.shape[0], device=visual_T.device)
            needed = int(visual_T.sum())
            if needed != len(rows):
                raise ValueError(f"{needed} image tokens in the batch, but its images have {len(rows)}")
            row_T = torch.zeros_like(batch.input_ids[0]).masked_scatter(visual_T, rows)
            here_T = visual_T[positions_T]
            images_VH = features_MLH[row_T[positions_T][here_T], 0]
            embedding_T1H = embedding_T1H.masked_scatter(here_T[:, None, None], images_VH)
            if self.config.sequence_parallel:
                # Each rank back-propagates through its own rows only: their gradients have to be summed.
                features_MLH = tensor_parallel.copy_to_tensor_model_parallel_region(features_MLH)
            mine_T = self._share(positions_T)
            features_KVH = features_MLH[row_T[mine_T][visual_T[mine_T]], 1:].transpose(0, 1)
        elif self.vision.sharding.run_without_images and torch.is_grad_enabled():
            embedding_T1H = embedding_T1H + self.vision.nothing()
        if self.config.sequence_parallel:
            embedding_T1H = tensor_parallel.scatter_to_sequence_parallel_region(embedding_T1H)
        return embedding_T1H, features_KVH

    def _receive(self, tokens: int, placeholders: int) -> torch.Tensor | None:
        """Split what the previous stage sent: hidden states for the decoder, deepstack features [K, V, H]."""
        assert self._received is not None
        self.language_model.set_input_tensor(self._received[:tokens])
        features = self._received[tokens:]
        return features.reshape(-1, placeholders, features.shape[-1]) if features.shape[0] else None

    def forward(self, batch: PackedBatch, request: LossRequest | None = None) -> torch.Tensor | PolicyLossOutput:
        """The last chunk returns float32 [2, R]: log-probs of the response tokens and the entropies of their
        distributions, on every context-parallel rank; or the policy loss that `request` asks for; or a scalar head's
        values, [1, R]. Other chunks return hidden states for the next one."""
        split: ContextSplit | None = split_context(batch.bounds, self.context_parallel_group, batch.input_ids.device)
        everything_T = torch.arange(batch.num_tokens, device=batch.input_ids.device)
        positions_T = everything_T if split is None else split.positions
        visual_T = self._is_visual(batch)
        mine_T = self._share(positions_T)
        visual_rows_V = visual_T[mine_T].nonzero()[:, 0]
        if self.pre_process:
            embedding_T1H, features_KVH = self._embed(batch, positions_T, visual_T)
        else:
            embedding_T1H, features_KVH = None, self._receive(len(mine_T), len(visual_rows_V))
        hidden_T1H = self.language_model(
            input_ids=None,
            position_ids=batch.position_ids if split is None else batch.position_ids[..., split.positions],
            attention_mask=None,
            decoder_input=embedding_T1H,
            packed_seq_params=DecoderRow(
                **vars(packed(batch.cu_seqlens, batch.bounds, split)),
                visual_rows=visual_rows_V,
                first_level=self.layers.start,
                balance=_balance(batch, mine_T) if self.config.num_moe_experts else None,
            ),
            extra_block_kwargs={"context": features_KVH},
        )
        if self.post_process:
            return self.output(hidden_T1H, batch, split, request)
        later = max(self.levels - self.layers.stop, 0)
        if later and features_KVH is not None:
            hidden_T1H = torch.cat([hidden_T1H, features_KVH[-later:].flatten(0, 1)[:, None]])
        return hidden_T1H
