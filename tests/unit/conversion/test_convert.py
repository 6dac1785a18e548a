"""Conversion both ways without a model: byte for byte, resumable, strict about names, honest about damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from megatron_r1reward.checkpoint import streaming
from megatron_r1reward.checkpoint.manifest import find_damage
from megatron_r1reward.conversion.convert import export_folder, import_folder
from megatron_r1reward.conversion.convert_commands import app
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.model_folder.folder_weights import weight_table
from megatron_r1reward.model_folder.shape import load_shape
from megatron_r1reward.types import TensorMeta


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def sharded_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in bfloat16, in three files with an index, as large models are published."""
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    shutil.copytree(tiny_folder, folder)
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def round_trip(folder: Path, tmp_path: Path) -> Path:
    import_folder(folder, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    return tmp_path / "back"


@pytest.mark.slow
def test_every_file_comes_back_byte_for_byte(tiny_folder: Path, sharded_folder: Path, tmp_path: Path) -> None:
    for number, folder in enumerate((tiny_folder, sharded_folder)):
        (tmp_path / str(number)).mkdir()
        assert digests(round_trip(folder, tmp_path / str(number))) == digests(folder)


@pytest.fixture(scope="module")
def imported(sharded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "megatron"
    import_folder(sharded_folder, out, progress=False)
    return out


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.slow
def test_verify_names_the_tensor_with_a_flipped_bit(sharded_folder: Path, imported: Path, tmp_path: Path) -> None:
    assert run("verify", imported, "--against", sharded_folder) == (0, f"{imported}: intact\n")
    copy = tmp_path / "copy"
    shutil.copytree(imported, copy)
    name = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
    manifest = json.loads((copy / "manifest.json").read_text())
    file, item = next(
        (file, item) for file, e in manifest["files"].items() for item in e.get("items", ()) if item["name"] == name
    )
    content = bytearray((copy / file).read_bytes())
    content[item["offset"] + item["length"] // 2] ^= 0x10
    (copy / file).write_bytes(content)
    code, output = run("verify", copy, "--against", sharded_folder)
    assert code == 1
    assert f"tensor {name} in {file} does not match its hash" in output
    assert "tensor model.layers.1.mlp.down_proj.weight differs from the one in" in output
    assert output.count("tensor ") == 2  # and no other
    with (copy / file).open("r+b") as handle:
        handle.truncate(len(content) - 1000)
    assert "truncated" in run("verify", copy)[1]
    with pytest.raises(ValueError, match=r"ends at|damaged"):
        export_folder(copy, tmp_path / "never", progress=False)
    assert not (tmp_path / "never").exists()


def test_names_are_used_exactly_once_or_the_import_is_refused(sharded_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(sharded_folder, folder)
    file = folder / "model-00001-of-00003.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    tensors["surprise.weight"] = tensors.pop(lost)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{lost} is in {file.name}, which does not hold it"):
        import_folder(folder, tmp_path / "out", progress=False)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k != lost} | {"surprise.weight": file.name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"1 missing: {lost}; 1 unknown: surprise.weight"):
        import_folder(folder, tmp_path / "out", progress=False)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(ValueError, match="its header says"):
        import_folder(folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_goes_on_where_it_stopped(
    sharded_folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = streaming._write_file

    def third_file_fails(path: Path, *args: object) -> object:
        if len(written) == 2:
            raise OSError("the machine goes down")
        result = real(path, *args)  # type: ignore[arg-type]
        written.append(path.name)
        return result

    monkeypatch.setattr(streaming, "_write_file", third_file_fails)
    with pytest.raises(OSError, match="goes down"):
        export_folder(imported, tmp_path / "hf", threads=1, progress=False)
    assert not (tmp_path / "hf").exists()
    monkeypatch.setattr(streaming, "_write_file", lambda path, *args: (written.append(path.name), real(path, *args))[1])
    export_folder(imported, tmp_path / "hf", threads=1, progress=False)
    assert sorted(written) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]  # each once
    assert digests(tmp_path / "hf") == digests(sharded_folder)
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]


@pytest.mark.slow
def test_a_tied_folder_may_hold_the_head_only_as_a_copy(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    write_tiny_checkpoint(folder, corpus=CORPUS, init_std=0.15, tie_word_embeddings=True)
    assert run("verify", round_trip(folder, tmp_path), "--against", folder)[0] == 0
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_folder(folder, tmp_path / "megatron2", progress=False)
    export_folder(tmp_path / "megatron2", tmp_path / "back2", progress=False)
    assert digests(tmp_path / "back2") == digests(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="ties the embeddings"):
        import_folder(folder, tmp_path / "megatron3", progress=False)


def transformers_metas(folder: Path) -> list[TensorMeta]:
    """Every tensor of transformers' own model, in bfloat16, built without weights."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    metas = [TensorMeta.of(name, tensor) for name, tensor in model.state_dict().items()]
    return [meta for meta in metas if not (config.tie_word_embeddings and meta.name == "lm_head.weight")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tensors", "size"), [("7b", 729, 16_584_333_312), ("3b", 824, 7_509_245_952)])
def test_published_configurations_convert_in_a_dry_run(model: str, tensors: int, size: int, tmp_path: Path) -> None:
    """Every name of transformers' own model is used once, under its own and under the published spelling."""
    config = Path(__file__).parents[2] / f"data/qwen2_5_vl_{model}/config.json"
    metas = transformers_metas(config.parent)
    shapes = weight_table(load_shape(config.parent)).hf_shapes
    assert {weight_table(load_shape(config.parent)).canonical(m.name): m.shape for m in metas} == shapes
    assert (len(metas), sum(meta.num_bytes for meta in metas)) == (tensors, size)  # what the published index says
    names = [meta.name for meta in metas]
    published = [name.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for name in names]
    for spelling in (names, published):
        folder = tmp_path / spelling[0]
        folder.mkdir()
        shutil.copy(config, folder)
        index = {"weight_map": dict.fromkeys(spelling, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        code, output = run("import", "--dry-run", folder, tmp_path / "out")
        assert code == 0, output
        assert "would write" in output
        index["weight_map"].pop(spelling[7])
        index["weight_map"]["odd"] = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert run("import", "--dry-run", folder, tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_folder_converts_in_a_dry_run(tmp_path: Path) -> None:
    """R1-Reward is a full fine-tune of Qwen2.5-VL-7B-Instruct: its configuration is that of the 7B as transformers
    writes it on `save_pretrained` (nested, every default spelled out), its names are the published ones in shards."""
    original = Path(__file__).parents[2] / "data/qwen2_5_vl_7b"
    folder = tmp_path / "r1_reward"
    AutoConfig.from_pretrained(original).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert set(written) - set(json.loads((original / "config.json").read_text()))  # another spelling of the same model
    names = [meta.name for meta in transformers_metas(original)]
    published = [name.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for name in names]
    shards = {name: f"model-{number % 4 + 1:05d}-of-00004.safetensors" for number, name in enumerate(published)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    code, output = run("import", "--dry-run", folder, tmp_path / "out")
    assert code == 0, output
    assert "would write" in output


def test_merging_is_the_weighted_sum(imported: Path, sharded_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sharded_folder, other)
    for path in other.glob("*.safetensors"):
        save_file({k: v * 2 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    assert run("merge", "--out", tmp_path / "m", "--weights", "0.25,0.75", imported, other)[0] == 0
    for path in sharded_folder.glob("*.safetensors"):
        merged = load_file(tmp_path / "m" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(merged[name], (0.25 * tensor.float() + 0.75 * (tensor * 2).float()).to(tensor.dtype))
    assert run("merge", "--out", tmp_path / "n", "--weights", "0.5,0.6", imported, other)[0] == 2
    assert run("average", "--out", tmp_path / "a", imported, sharded_folder)[0] == 0
    assert digests(tmp_path / "a") == digests(sharded_folder)


def test_fp8_export_is_what_transformers_decompresses(imported: Path, sharded_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    assert run("export", "--fp8", imported, out)[0] == 0
    original = {k: v for p in sharded_folder.glob("*.safetensors") for k, v in load_file(p).items()}
    quantized = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert quantized[name].dtype == torch.float8_e4m3fn
    assert quantized[f"{name}_scale"].shape == (original[name].shape[0], 1)
    for tensor in (n for n in original if quantized[n].dtype == torch.float8_e4m3fn):
        back = quantized[tensor].float() * quantized[f"{tensor}_scale"]
        # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, or of the smallest normal number below it.
        bound = original[tensor].float().abs() / 16 + quantized[f"{tensor}_scale"] * 2.0**-10
        assert ((back - original[tensor].float()).abs() <= bound).all()
    kept = [n for n in original if quantized[n].dtype != torch.float8_e4m3fn]
    assert all(torch.equal(quantized[n], original[n]) for n in kept)
    assert {"lm_head.weight", "model.embed_tokens.weight", "visual.merger.mlp.0.weight"} <= set(kept)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_inspect_says_what_is_there(imported: Path, sharded_folder: Path) -> None:
    code, output = run("inspect", imported, "--json")
    facts = json.loads(output)
    assert (code, facts["kind"], facts["manifest"]) == (0, "weights", "complete")
    hf = json.loads(run("inspect", sharded_folder, "--json")[1])
    total = sum(t.nbytes for p in sharded_folder.glob("*.safetensors") for t in load_file(p).values())
    for found in (facts, hf):
        assert sum(part["bytes"] for part in found["parts"].values()) == total


def test_dtype_changes_on_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    import_folder(tiny_folder, tmp_path / "m", dtype="bfloat16", progress=False)
    export_folder(tmp_path / "m", tmp_path / "hf", dtype="bfloat16", progress=False)
    original = load_file(tiny_folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(tensor, original[name].to(torch.bfloat16))
    assert list(find_damage(tmp_path / "m")) == []
