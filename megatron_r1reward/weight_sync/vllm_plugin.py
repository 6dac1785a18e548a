"""What vLLM loads in each of its processes (entry point group `vllm.general_plugins`). Imports nothing by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

_SCALAR = "megatron_r1reward.servers.vllm_scalar"
_SCALAR_MODELS = (  # classes there
    "Qwen2_5_VLForSequenceClassification",
    "Qwen3VLForSequenceClassification",
    "Qwen3VLMoeForSequenceClassification",
)
_RECEIVERS = {"r1reward_gloo": "GroupReceiver", "r1reward_nccl": "GroupReceiver", "r1reward_ipc": "SharedReceiver"}


def register() -> None:
    """Make our weight transports known to `--weight-transfer-config`, transposed experts to `--load-format`, and the
    architectures of scalar reward models to the registry of models. Called once or more per process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    from megatron_r1reward.servers.command import EXPERTS_LOAD_FORMAT

    for backend, receiver in _RECEIVERS.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, "megatron_r1reward.weight_sync.vllm_worker", receiver)
    if EXPERTS_LOAD_FORMAT not in _LOAD_FORMAT_TO_MODEL_LOADER:
        _register_experts_loader(EXPERTS_LOAD_FORMAT)
    _register_scalar_models()


def _register_scalar_models() -> None:
    """By name: they are imported where one is served."""
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in _SCALAR_MODELS:
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{_SCALAR}:{architecture}")


def _register_experts_loader(load_format: str) -> None:
    """A loader for folders that stack experts as transformers 5 saves them, [experts, out, in]: vLLM takes stacked
    experts for [experts, in, out], as published folders and our pushes have them."""
    import torch
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader(load_format)
    class TransposedExpertsLoader(DefaultModelLoader):
        def __init__(self, load_config: LoadConfig) -> None:
            super().__init__(replace(load_config, load_format="safetensors"))

        def get_all_weights(
            self, model_config: ModelConfig, model: torch.nn.Module
        ) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().get_all_weights(model_config, model):
                stacked = ".mlp.experts." in name and tensor.dim() == 3
                yield name, tensor.transpose(1, 2) if stacked else tensor
