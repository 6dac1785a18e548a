"""Export of FP8 weights for serving: the compressed-tensors format, which vLLM and transformers read.

The language model's linear layers become float8_e4m3fn with one float32 scale per output row; activations are quantized
per token at run time. Embedding, LM head, norms, biases, router and the vision tower stay as they are: they are small,
or sensitive, or (vision MLP of Qwen2.5-VL, 3420 wide) no FP8 GEMM shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.conversion.convert import ConversionSummary, default_threads, write_hf_folder
from megatron_r1reward.conversion.weight_source import HfTensor, WeightSource
from megatron_r1reward.types import TensorMeta

FP8 = torch.float8_e4m3fn
_QUANTIZED = re.compile(r"layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$")
_ROWS = 1024


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> float8_e4m3fn [out, in] and float32 scales [out, 1] with weight = fp8 * scale.

    A row of zeros has scale 1. Values are rounded to nearest even, as torch converts.
    """
    values = weight.float()
    largest = values.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / torch.finfo(FP8).max, torch.ones_like(largest))
    return (values / scale).to(FP8), scale


def quantization_config(ignored: list[str]) -> dict[str, object]:
    """The `quantization_config` of config.json in the compressed-tensors format."""

    def args(strategy: str, *, dynamic: bool) -> dict[str, object]:
        return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": dynamic}

    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": args("channel", dynamic=False),
                "input_activations": args("token", dynamic=True),
            }
        },
        "ignore": ignored,
    }


def export_fp8(
    folder: Path, out: Path, *, template: Path | None = None, threads: int | None = None, progress: bool = True
) -> ConversionSummary:
    """Hugging Face folder or distributed checkpoint -> FP8 Hugging Face folder.

    Raises:
        ValueError: the model has no such linear layers (stacked experts are not supported), or `out` exists.
    """
    sources = Sources()
    source = WeightSource(folder, sources, template=template)
    if source.shape.quantized is not None:
        raise ValueError(f"{folder} is quantized by {source.shape.quantized!r} already: name what it was made from")
    if any(entry.expert is not None for entry in source.table):
        raise ValueError(f"{folder}: FP8 export of experts is not supported; serve the bfloat16 folder")
    tensors: dict[str, HfTensor] = {}
    for name, on_disk in source.on_disk.items():
        tensor = source.tensor(on_disk)
        if not _QUANTIZED.search(name):
            tensors[on_disk] = tensor
            continue
        scales = on_disk.removesuffix(".weight") + ".weight_scale"
        shape = (tensor.meta.shape[0], 1)
        tensors[on_disk] = HfTensor(
            meta=replace(tensor.meta, dtype="float8_e4m3fn"),
            views=lambda tensor=tensor: _quantized(tensor, 0),  # type: ignore[misc]
        )
        tensors[scales] = HfTensor(
            meta=TensorMeta(name=scales, dtype="float32", shape=shape),
            views=lambda tensor=tensor: _quantized(tensor, 1),  # type: ignore[misc]
        )
    config = json.loads((source.template.folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(["lm_head", "re:.*visual.*"])
    summary = write_hf_folder(
        out,
        source,
        tensors,
        sources=sources,
        options={"fp8": source.description()},
        threads=threads or default_threads(),
        dry_run=False,
        progress=progress,
        extra_files={"config.json": json.dumps(config, indent=2) + "\n"},
    )
    sources.close()
    return summary


def _quantized(tensor: HfTensor, which: int) -> Iterator[torch.Tensor]:
    for view in tensor.views():
        for rows in view.split(_ROWS):
            yield quantize_rows(rows)[which]
