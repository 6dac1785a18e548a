"""What vLLM loads in each of its processes (entry point group `vllm.general_plugins`). Imports nothing by itself."""

from __future__ import annotations

_RECEIVERS = {"r1reward_gloo": "GroupReceiver", "r1reward_nccl": "GroupReceiver", "r1reward_ipc": "SharedReceiver"}


def register() -> None:
    """Make our weight transports known to `--weight-transfer-config`. Called once or more per process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, receiver in _RECEIVERS.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "megatron_r1reward.weight_sync.vllm_worker", receiver)
