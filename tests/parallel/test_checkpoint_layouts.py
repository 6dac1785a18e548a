"""Conversion against real models: every family, every layout, not one byte or value changed."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from corpus import CORPUS
from family import MEMBERS, Member
from megatron.core import dist_checkpointing
from ranks import run_ranks

from megatron_r1reward.checkpoint.dist import load_weights, sharding_metadata
from megatron_r1reward.checkpoint.hf_model_io import HfReader, load_hf_weights
from megatron_r1reward.checkpoint.saver import WriteResults
from megatron_r1reward.checkpoint.weight_exporter import WeightExporter
from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.conversion import parity
from megatron_r1reward.conversion.convert import export_folder, import_folder
from megatron_r1reward.conversion.parity import log_prob_difference
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.models.base import join_chunks
from megatron_r1reward.models.registry import family_of
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import TensorMeta

pytestmark = pytest.mark.parallel

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "TP2xPP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "EP2": (2, {"expert_model_parallel_size": 2}),
}
# Which member's checkpoint is saved again under the layout, and exported from there.
SAVED = {
    "one rank": "qwen2_5_vl",
    "TP2": "qwen2_5_vl",
    "PP2": "qwen3_vl tied",
    "PP2 VPP2": "qwen3_vl",
    "TP2xPP2": "qwen2_5_vl tied",
    "EP2": "qwen3_vl_moe",
}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> (Hugging Face folder, what the offline import made of it)."""
    root = tmp_path_factory.mktemp("members")
    folders = {}
    for name, spec in MEMBERS.items():
        hf, megatron = root / name.replace(" ", "-"), root / (name.replace(" ", "-") + "-megatron")
        spec = replace(spec, num_layers=4)  # two stages of two chunks
        write_tiny_checkpoint(hf, corpus=CORPUS, init_std=0.15, spec=spec)
        import_folder(hf, megatron, progress=False)
        folders[name] = (hf, megatron)
    return folders


def build(folder: Path, parallel: dict[str, Any], topology: setup.Topology) -> tuple[torch.nn.Module, Any]:
    member = Member(folder)
    family = family_of(member.config)
    section = ParallelSection.model_validate(parallel)
    configs = family.build_configs(member.config, section, torch.float32, PrecisionSection(), MoeSection())
    chunks = [family.build_model(configs, topology, n) for n in range(topology.virtual_pipeline_parallel_size)]
    return join_chunks(chunks), family.weight_table(member.config)


def check_members(members: dict[str, tuple[Path, Path]], parallel: dict[str, Any], again: tuple[str, str]) -> list[str]:
    """Load every imported checkpoint, compare with the Hugging Face folder, gather it; save one member again."""
    topology = setup.initialize(ParallelSection.model_validate(parallel), seed=0)
    problems = []
    for name, (hf, megatron) in members.items():
        if parallel.get("expert_model_parallel_size", 1) > 1 and "moe" not in name:
            continue
        imported, table = build(hf, parallel, topology)
        load_weights(megatron, imported)
        direct, _ = build(hf, parallel, topology)
        for chunk in direct if topology.virtual_pipeline_parallel_size > 1 else [direct]:
            load_hf_weights(chunk, hf, table)
        for (key, a), b in zip(imported.named_parameters(), direct.parameters(), strict=True):
            if not torch.equal(a, b):
                problems.append(f"{name}: {key} differs after the import")
        exporter = WeightExporter(imported, table, topology, bucket_bytes=100_000)  # many buckets, some too small
        reader, metas = HfReader(hf), []
        for key, tensor in exporter.tensors():
            metas.append(TensorMeta.of(key, tensor))
            if not torch.equal(tensor, reader[key]):
                problems.append(f"{name}: {key} differs when it is gathered")
        if metas != (exporter.metas if topology.is_main else []):
            problems.append(f"{name}: the announced tensors are not those that came")
        if name == again[0]:
            results = WriteResults()
            results.start()
            dist_checkpointing.save({"model": imported.sharded_state_dict(metadata=sharding_metadata())}, again[1])
            results.close()
    left = psutil.Process().children(recursive=True)
    return problems + [f"{process} is left" for process in left]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_round_trips_under_every_layout(
    layout: str, members: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    ranks, parallel = LAYOUTS[layout]
    saved = tmp_path / "saved"
    saved.mkdir()
    for problems in run_ranks(check_members, ranks, members, parallel, (SAVED[layout], str(saved))):
        assert problems == []
    hf = members[SAVED[layout]][0]
    export_folder(saved, tmp_path / "hf", template=hf, progress=False)
    assert digests(tmp_path / "hf") == digests(hf)


def odd_vocabulary(hf: Path, saved: str, parallel: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Log-probs of the sample and the norm of the gradient of the head's padding rows; the weights go to `saved`."""
    topology = setup.initialize(ParallelSection.model_validate(parallel), seed=0)
    model, table = build(hf, parallel, topology)
    load_hf_weights(model, hf, table)
    packer, sequence = parity._sample(hf, Path(saved).with_suffix(f".{topology.rank}.png"))
    output_2R = model(packer.pack([sequence], [0]))
    output_2R.sum().backward()
    head = model.language_model.output_layer.weight
    padding = head.shape[0] * topology.tensor_parallel_size - Member(hf).config.text_config.vocab_size
    last = topology.tensor_parallel_rank == topology.tensor_parallel_size - 1
    assert padding == (1 if topology.tensor_parallel_size == 2 else 0)
    norm = float(head.grad[-padding:].norm()) if padding and last else 0.0
    results = WriteResults()
    results.start()
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=sharding_metadata())}, saved)
    results.close()
    return output_2R.detach(), norm


def test_a_vocabulary_that_tensor_parallelism_does_not_divide(tmp_path: Path) -> None:
    """A model that was resized by a few tokens: the same log-probs, no gradient of padding, the same export."""
    hf = tmp_path / "hf"
    spec = replace(MEMBERS["qwen2_5_vl"], num_layers=2, pad_vocab_to=999)  # an odd number of rows
    write_tiny_checkpoint(hf, corpus=CORPUS, init_std=0.15, spec=spec)
    outputs = []
    for ranks, parallel in ((1, {}), (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True})):
        saved = tmp_path / f"saved-{ranks}"
        saved.mkdir()
        found = run_ranks(odd_vocabulary, ranks, hf, str(saved), parallel)
        outputs += [output for output, _ in found]
        assert all(norm == 0.0 for _, norm in found)
        export_folder(saved, tmp_path / f"back-{ranks}", template=hf, progress=False)
        assert digests(tmp_path / f"back-{ranks}") == digests(hf)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=5e-5, rtol=0)  # float32 sums in another order


@pytest.mark.parametrize("name", MEMBERS)
def test_an_untrained_import_exports_to_the_same_bytes(
    name: str, members: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hf, megatron = members[name]
    export_folder(megatron, tmp_path / "hf", progress=False)
    assert digests(tmp_path / "hf") == digests(hf)


def test_an_imported_model_computes_what_transformers_computes(members: dict[str, tuple[Path, Path]]) -> None:
    for hf, megatron in members.values():
        assert run_ranks(log_prob_difference, 1, megatron, hf)[0] < 2e-4
    hf, megatron = members["qwen2_5_vl"]
    other = members["qwen2_5_vl"][0].parent / "other"
    shutil.rmtree(other, ignore_errors=True)
    spec = replace(MEMBERS["qwen2_5_vl"], num_layers=4)
    write_tiny_checkpoint(other, corpus=CORPUS, init_std=0.15, spec=spec, seed=1)
    assert run_ranks(log_prob_difference, 1, megatron, other)[0] > 0.01
