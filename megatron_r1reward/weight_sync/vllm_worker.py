"""vLLM's end of the weight transports; runs inside each of its workers. Written for vLLM 0.32."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.broadcast_group import Inlet, Rendezvous
from megatron_r1reward.weight_sync.buckets import Bucket, UpdateMessage, WeightUpdate, checksums, verify
from megatron_r1reward.weight_sync.shared_memory import IPC_ADVICE, SharedBuffer, open_cuda, open_memory_file


class _Receiver(WeightTransferEngine[Any, Any]):
    """Loads checkpoint tensors layer by layer; an update that was broken off can be begun again.

    Layerwise reload is not optional on a CPU: linear layers keep their weights in a packed form only, and
    `load_weights` on its own would write into empty tensors.
    """

    update_info_cls = UpdateMessage
    supports_draft_weight_update = False
    _expert_kernels: dict[UnquantizedFusedMoEMethod, Any] | None = None  # those taken out for the update under way

    def start_weight_update(self) -> None:
        _forget_partial_layers(self.model)
        if self.device.type == "cpu":  # those that an abandoned update has taken out are still out
            self._expert_kernels = (self._expert_kernels or {}) | _take_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateMessage) -> None:
        if update_info.abandon:
            raise WeightPushError("the update is abandoned")  # the only way to end one without finishing it
        assert update_info.update is not None
        self._receive(WeightUpdate(**update_info.update), update_info)
        # Not in `finish_weight_update`: vLLM ends an update whose message fails, not one whose end fails.
        if update_info.last and (incomplete := _incomplete_layers(self.model)):
            raise WeightPushError(
                f"only a part of the weights of {', '.join(incomplete)} came: a fused layer (q, k and v; gate and up) "
                "must be pushed as a whole"
            )

    def _receive(self, update: WeightUpdate, message: UpdateMessage) -> None:
        raise NotImplementedError

    def _load(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """`flat` must not change before the update is finished: incomplete layers keep views of it."""
        if flat.is_cuda:  # it came on another thread's stream, and may be freed while this one's still reads it
            flat.record_stream(torch.cuda.current_stream(flat.device))
        self.model.load_weights([(name, tensor.to(self.device)) for name, tensor in bucket.tensors(flat)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_lm_head(self.model)
        for method, kernel in (self._expert_kernels or {}).items():
            method.moe_kernel = method.moe_kernel or kernel  # no new weights came for this layer
        self._expert_kernels = None


class GroupReceiver(_Receiver):
    """Receives by broadcast, in a thread of its own, while buckets that have come are being loaded. The checksums come
    last."""

    init_info_cls = Rendezvous
    _inlet: Inlet | None = None

    def init_transfer_engine(self, init_info: Rendezvous) -> None:
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        self._inlet = Inlet.join(init_info, init_info.rank_offset + worker, device)

    def _receive(self, update: WeightUpdate, message: UpdateMessage) -> None:
        inlet = self._inlet
        if inlet is None:
            raise WeightPushError("no weight sender is connected: call /init_weight_transfer_engine first")
        buckets = update.buckets()
        inlet.begin(buckets[-1].start + buckets[-1].num_bytes)
        got = []
        failure: Exception | None = None
        for bucket, flat, sums in self._incoming(inlet, buckets):
            if failure is not None:
                continue  # received all the same: the sender and the other workers would wait for one who left
            try:
                self._load(bucket, flat)
                got.append(sums)
            except Exception as error:
                failure = error
        metas = [meta for bucket in buckets for meta in bucket.metas]
        expected = inlet.checksums(len(metas))
        if failure is not None:
            raise failure
        verify(metas, expected, torch.cat(got))

    def _incoming(self, inlet: Inlet, buckets: Sequence[Bucket]) -> Iterator[tuple[Bucket, torch.Tensor, torch.Tensor]]:
        """(bucket, its bytes, uint8 [num_bytes], its checksums, int64 [tensors]).

        While the caller has one, others come in: all that there is room for, which on a GPU is the next one.
        """
        ahead = len(buckets) if self.device.type != "cuda" else 1

        def receive(bucket: Bucket) -> tuple[Bucket, torch.Tensor, torch.Tensor]:
            flat = inlet.receive(bucket)
            return bucket, flat, checksums(bucket, flat)

        waiting = iter(buckets)
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        try:
            coming = deque(thread.submit(receive, bucket) for bucket in islice(waiting, ahead))
            while coming:
                arrived = coming.popleft().result()
                coming.extend(thread.submit(receive, bucket) for bucket in islice(waiting, 1))
                yield arrived
        finally:
            thread.shutdown(cancel_futures=True)  # some are left when a broadcast broke off

    def shutdown(self) -> None:
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None


class SharedReceiver(_Receiver):
    """Reads a buffer that the sender has filled; one call per bucket."""

    init_info_cls = SharedBuffer
    _shared: torch.Tensor | None = None

    def init_transfer_engine(self, init_info: SharedBuffer) -> None:
        self.shutdown()
        if init_info.cuda is not None:
            self._shared = open_cuda(init_info, self.device)
        else:
            assert init_info.path is not None
            self._shared = open_memory_file(init_info.path, init_info.num_bytes, IPC_ADVICE)

    def _receive(self, update: WeightUpdate, message: UpdateMessage) -> None:
        if self._shared is None:
            raise WeightPushError("no weight sender is connected: call /init_weight_transfer_engine first")
        assert message.offset is not None and message.checksums is not None
        (bucket,) = update.buckets()
        flat = self._shared[message.offset : message.offset + bucket.num_bytes]
        if flat.is_cuda:  # a staging buffer, which the next bucket overwrites; a memory file holds all of them
            flat = flat.clone()
        verify(bucket.metas, torch.tensor(message.checksums), checksums(bucket, flat))
        self._load(bucket, flat)

    def shutdown(self) -> None:
        self._shared = None


def _forget_partial_layers(model: torch.nn.Module) -> None:
    """Undo what an update that was broken off has left: tensors that wait for the rest of their layer."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


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


def _take_expert_kernels(model: torch.nn.Module) -> dict[UnquantizedFusedMoEMethod, Any]:
    """Take their kernels out of the layers with experts; by the method that has lost one.

    vLLM packs the experts of a layer for a CPU where it builds their kernel, which it does once: weights that come
    later are read as if they were packed, without an error. A layer without a kernel builds and packs again.
    """
    methods = [getattr(layer, "quant_method", None) for layer in model.modules()]
    taken = {}
    for method in methods:
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            taken[method], method.moe_kernel = method.moe_kernel, None
    return taken


def _repack_lm_head(model: torch.nn.Module) -> None:
    """Refresh the packed copy of a tied LM head, which on a CPU layerwise reload leaves as it was.

    The reload sees the shared parameter as the embedding's only; the head multiplies with a packed copy of it.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
