"""What vLLM loads in each of its processes (entry point group `vllm.general_plugins`). Imports nothing by itself."""

from __future__ import annotations


def register() -> None:
    """Make `--weight-transfer-config '{"backend": "gloo"}'` known. Called once or more per process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "gloo", "megatron_r1reward.rollout.vllm_gloo_engine", "GlooWeightTransferEngine"
        )
