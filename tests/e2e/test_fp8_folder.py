"""An exported FP8 folder, served by a real vLLM server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reference import SERVER, Reference
from safetensors.torch import load_file

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.conversion.fp8_export import FP8, export_fp8
from megatron_r1reward.rollout.open_pool import open_rollout_pool
from megatron_r1reward.types import Rollout

pytestmark = pytest.mark.e2e


def quantize_activations(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What the format prescribes before each quantized layer: one scale per token."""
    scale = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return ((inputs[0] / scale).to(FP8).float() * scale,)


def quantized_like(folder: Path, original: Path) -> Reference:
    """transformers' model of the original folder with the stored FP8 weights, and the same rounding of activations."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    imitation = Reference(original)
    modules = dict(imitation.model.named_modules())
    scales = [name for name in stored if name.endswith(".weight_scale")]
    assert len(scales) == 7 * imitation.model.config.text_config.num_hidden_layers
    for name in scales:
        layer = name.removesuffix(".weight_scale")
        module = next(m for n, m in modules.items() if n.endswith(layer.removeprefix("model.")))
        weight = stored[layer + ".weight"].float() * stored[name]
        assert (module.weight - weight).abs().max() <= module.weight.abs().max() / 16  # e4m3: three bits of mantissa
        module.weight.data.copy_(weight)
        module.register_forward_pre_hook(quantize_activations)
    return imitation


def mean_gap(model: Reference, rollouts: Sequence[Rollout]) -> float:
    gaps = [model.log_probs(rollout) - torch.tensor(rollout.log_probs) for rollout in rollouts]
    return float(torch.cat(gaps).abs().mean())


def test_vllm_serves_the_quantized_weights(
    tiny_folder: Path, reference: Reference, image_paths: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    export_fp8(tiny_folder, folder, progress=False)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    served = quantized_like(folder, tiny_folder)
    prompts = [
        reference.prompt("text", "Which digit is shown?"),
        reference.prompt("image", "Which response is better?", image_paths[1]),
    ]
    with open_rollout_pool(
        SERVER, model_path=folder, tokenizer=reference.tokenizer, log_dir=tmp_path / "logs", media_roots=[Path("/")]
    ) as pool:
        result = pool.generate(prompts, SamplingSection(max_tokens=8), n=4, seed=0)
    assert not result.failed
    quantized, original = (mean_gap(model, result.rollouts) for model in (served, reference))
    print(f"mean log-prob gap: to the quantized model {quantized:.4f} nats, to the original {original:.4f}")
    # Not zero: a float32 rounding difference now and then moves an activation to its neighbour in FP8.
    assert quantized < min(0.03, original / 4)
