"""vLLM's end of the gloo transport; runs inside each of its workers. Written for vLLM 0.32."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_r1reward.rollout.gloo_wire import GlooGroup, GlooRendezvous, GlooUpdate


class GlooWeightTransferEngine(WeightTransferEngine[Any, Any]):
    """Receives checkpoint tensors from the sender and reloads the model layer by layer.

    Layerwise reload is not optional on a CPU: linear layers keep their weights in a packed form only, and
    `load_weights` on its own would write into empty tensors.
    """

    init_info_cls = GlooRendezvous
    update_info_cls = GlooUpdate
    supports_draft_weight_update = False

    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooRendezvous) -> None:
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = GlooGroup.join(init_info, init_info.rank_offset + worker)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        if self._group is None:
            raise RuntimeError("no weight sender is connected: call /init_weight_transfer_engine first")
        for bucket in update_info.buckets():
            sizes = [meta.numel for meta in bucket]
            flat = torch.empty(sum(sizes), dtype=bucket[0].torch_dtype)
            self._group.broadcast(flat)
            parts = zip(bucket, flat.split(sizes), strict=True)
            self.model.load_weights([(meta.name, part.view(meta.shape).to(self.device)) for meta, part in parts])

    def finish_weight_update(self) -> None:
        if incomplete := _incomplete_layers(self.model):
            raise RuntimeError(
                f"only a part of the weights of {', '.join(incomplete)} came: a fused layer (q, k and v; gate and up) "
                "must be pushed as a whole"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_lm_head(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _incomplete_layers(model: torch.nn.Module) -> list[str]:
    """Layers that got some but not all of their elements; finishing them would leave uninitialised memory inside.

    Embeddings are exempt: their padding rows are never in a checkpoint.
    """
    names = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        total = info.load_numel_total
        started = total is not None and 0 < info.load_numel < total
        if started and not isinstance(layer, VocabParallelEmbedding):
            names.append(name)
    return names


def _repack_lm_head(model: torch.nn.Module) -> None:
    """Refresh the packed copy of a tied LM head, which on a CPU layerwise reload leaves as it was.

    The reload sees the shared parameter as the embedding's only; the head multiplies with a packed copy of it.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
