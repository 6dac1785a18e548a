"""`convert inspect`: what is in a folder of either kind. A Hugging Face folder is looked at without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_r1reward.conversion.weight_source import load_template, planned_weights
from megatron_r1reward.files import read_json
from megatron_r1reward.model_folder.beside_weights import check_files
from megatron_r1reward.model_folder.folder_weights import FolderWeights
from megatron_r1reward.model_folder.other_folder import is_distributed
from megatron_r1reward.types import TensorMeta


def inspect(folder: Path) -> dict[str, Any]:
    """Tensors, bytes, dtypes, and for a training checkpoint step, layout, run.

    Raises:
        ValueError: the folder is neither kind, damaged, or its tensors are not those of its configuration.
    """
    facts: dict[str, Any] = {"folder": str(folder)}
    if is_distributed(folder):
        metas = _distributed(folder, facts)
    else:
        there = any(folder.glob("*.safetensors"))
        weights = load_template(folder).weights if there else planned_weights(folder)
        metas = _hugging_face(weights, facts)
    by_part: dict[str, list[int]] = {}
    for meta in metas:
        part = by_part.setdefault(f"{meta.name.split('.')[0]} {meta.dtype}", [0, 0, 0])
        part[0], part[1], part[2] = part[0] + 1, part[1] + meta.numel, part[2] + meta.num_bytes
    facts["parts"] = {name: dict(zip(("tensors", "values", "bytes"), n, strict=True)) for name, n in by_part.items()}
    return facts


def head_name(score_layers: int) -> str:
    return {0: "lm", 1: "scalar, linear", 2: "scalar, two layers"}[score_layers]


def _hugging_face(weights: FolderWeights, facts: dict[str, Any]) -> list[TensorMeta]:
    facts |= {"kind": "Hugging Face", "family": weights.shape.family, "files": len(weights.files)}
    facts["tied"] = weights.table.tie is not None
    facts["head"] = head_name(weights.shape.score_layers)
    if weights.shape.quantized is not None:
        facts["quantized"] = weights.shape.quantized
    return [place.meta for file in weights.files for place in file.tensors]


def _distributed(folder: Path, facts: dict[str, Any]) -> list[TensorMeta]:
    from megatron_r1reward.checkpoint.manifest import find_damage, read_manifest
    from megatron_r1reward.checkpoint.streaming import Sources
    from megatron_r1reward.conversion.torch_dist_folder import TorchDistFolder
    from megatron_r1reward.conversion.weight_source import HEADERS, template_of, weight_table_of_template

    dist = TorchDistFolder(folder, Sources())
    facts["kind"] = "distributed"
    problem = next(iter(find_damage(folder, hashes=False)), None)
    facts["manifest"] = problem or "complete"
    if problem is None:
        manifest = read_manifest(folder)
        facts |= {key: manifest[key] for key in ("kind", "hash", "run", "step", "score") if key in manifest}
        facts["files"] = len(manifest["files"])
    if (folder / "state.json").is_file():
        state = read_json(folder / "state.json")
        facts |= {key: state[key] for key in ("layout", "weight_version", "data") if key in state}
        facts["head"] = head_name(state.get("score_layers", 0))
        if state.get("critic"):
            facts["critic"] = head_name(state["critic"]["layers"])
    try:
        template = template_of(folder)
    except ValueError as error:  # it can be looked at all the same
        facts["configuration"] = str(error)
    else:
        facts["configuration"] = str(template)
        check_files(template)
        if (template / HEADERS).is_file():
            load_template(template)
        dist.check(
            weight_table_of_template(template, folder), where=f"{folder}, against the configuration in {template}"
        )
    return dist.metas()
