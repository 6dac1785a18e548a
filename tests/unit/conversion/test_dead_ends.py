"""What used to end nowhere, or went wrong in silence: each has a way on, or a message before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.conversion.convert import export_folder, import_folder
from megatron_r1reward.conversion.convert_commands import app
from megatron_r1reward.conversion.weight_source import WeightSource, template_of
from megatron_r1reward.demo.tiny_models import TINY_SPECS, write_tiny_checkpoint
from megatron_r1reward.files import exclusive


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def imported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "megatron"
    import_folder(tiny_folder, out, progress=False)
    return out


def changed_copy(folder: Path, out: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(folder, out)
    kept = load_file(out / "model.safetensors") | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_the_fp8_folder_is_inspected_and_verified_and_not_imported(imported: Path, tmp_path: Path) -> None:
    assert run("export", "--fp8", imported, tmp_path / "fp8")[0] == 0
    code, output = run("inspect", tmp_path / "fp8")
    assert (code, "compressed-tensors" in output, "float8_e4m3fn" in output) == (0, True, True)
    assert run("verify", tmp_path / "fp8") == (0, f"{tmp_path / 'fp8'}: intact\n")
    code, output = run("import", tmp_path / "fp8", tmp_path / "never")
    assert code == 2
    assert "for serving" in output


@pytest.mark.slow
def test_everything_in_a_folder_travels_but_other_weights(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_folder, folder)
    (folder / "assets" / "deep").mkdir(parents=True)
    (folder / "assets" / "deep" / "voice.wav").write_bytes(b"sound")
    (folder / "tokens.tiktoken").write_text("a 1\n")
    (folder / "model.gguf").write_bytes(b"other weights")
    import_folder(folder, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert (tmp_path / "back" / "assets" / "deep" / "voice.wav").read_bytes() == b"sound"
    assert (tmp_path / "back" / "tokens.tiktoken").is_file()
    assert not (tmp_path / "back" / "model.gguf").exists()
    assert "not copied: model.gguf" in caplog.text
    assert run("verify", tmp_path / "megatron", "--against", folder)[0] == 0


def test_a_dangling_link_is_found_before_anything_is_written(tiny_folder: Path, imported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_folder, folder)
    (folder / "vocab.json").symlink_to("../../blobs/gone")
    for command in (["import", folder, tmp_path / "out"], ["export", imported, tmp_path / "out", "--template", folder]):
        code, output = run(*command)
        assert (code, "which is not there" in output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_one_conversion_writes_a_folder_at_a_time(imported: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / ".out.lock"):
        code, output = run("export", imported, tmp_path / "out")
    assert (code, "another conversion is writing" in output) == (2, True)
    assert run("export", imported, tmp_path / "out")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_relative_model_path_is_found_from_any_directory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "step"
    checkpoint.mkdir()
    state = {"config": {"model": {"path": tiny_folder.name}}, "working_directory": str(tiny_folder.parent)}
    (checkpoint / "state.json").write_text(json.dumps(state))
    monkeypatch.chdir(tmp_path)
    assert template_of(checkpoint) == tiny_folder
    (checkpoint / "state.json").write_text(json.dumps(state | {"working_directory": "/elsewhere"}))
    with pytest.raises(ValueError, match=r"relative to the directory .*/elsewhere.*--template"):
        template_of(checkpoint)


@pytest.mark.slow
def test_dtypes_that_differ_by_layer_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    half = load_file(tiny_folder / "model.safetensors")[name].bfloat16()
    folder = changed_copy(tiny_folder, tmp_path / "hf", **{name.replace(".", "__"): half})
    import_folder(folder, tmp_path / "megatron", progress=False)
    assert run("verify", tmp_path / "megatron", "--against", folder)[0] == 0
    assert run("average", "--out", tmp_path / "mean", tmp_path / "megatron", tmp_path / "megatron")[0] == 0
    mean, original = load_file(tmp_path / "mean" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(mean[key], value) and mean[key].dtype == value.dtype for key, value in original.items())


def test_the_configuration_of_an_export_names_its_dtype(imported: Path, tmp_path: Path) -> None:
    export_folder(imported, tmp_path / "hf", dtype="bfloat16", progress=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="give one of bfloat16"):
        export_folder(imported, tmp_path / "never", dtype="int32", progress=False)


def test_a_template_of_another_size_is_refused(imported: Path, tmp_path: Path) -> None:
    spec = TINY_SPECS["qwen2_5_vl"]
    for number, keys in enumerate(({"intermediate_size": 256}, {"num_layers": 3}, {"pad_vocab_to": 1000})):
        other = tmp_path / f"other-{number}"
        write_tiny_checkpoint(other, corpus=CORPUS, spec=type(spec)(**keys))
        code, output = run("export", imported, tmp_path / "out", "--template", other)
        assert (code, "the checkpoint is of another model" in output) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rotary_buffers_of_older_folders_do_not_disturb(tiny_folder: Path, tmp_path: Path) -> None:
    folder = changed_copy(tiny_folder, tmp_path / "hf", model__rotary_emb__inv_freq=torch.ones(16))
    import_folder(folder, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    back, original = load_file(tmp_path / "back" / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    assert set(back) == set(original)
    assert run("verify", tmp_path / "megatron", "--against", tiny_folder)[0] == 0


@pytest.mark.slow
def test_experts_as_newer_versions_save_them_are_the_same_numbers(tmp_path: Path) -> None:
    published = tmp_path / "published"
    write_tiny_checkpoint(published, corpus=CORPUS, init_std=0.15, spec=TINY_SPECS["qwen3_vl_moe"])
    tensors = load_file(published / "model.safetensors")
    moved = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if ".mlp.experts." in name}
    modules = changed_copy(published, tmp_path / "modules", **{k.replace(".", "__"): v for k, v in moved.items()})
    sources = Sources()
    ours, theirs = WeightSource(published, sources), WeightSource(modules, sources)
    for entry, other in zip(ours.table, theirs.table, strict=True):
        assert entry.megatron == other.megatron
        parameter = entry.layout.merge(ours.megatron_parts(entry))
        assert torch.equal(parameter, other.layout.merge(theirs.megatron_parts(other)))
    import_folder(modules, tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (modules / "model.safetensors").read_bytes()


def test_values_that_are_not_finite_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    """`verify` said "intact", and training began."""
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(tiny_folder / "model.safetensors")[name]
    for number, value in enumerate((float("nan"), float("inf"))):
        weight[0, 0] = value
        folder = changed_copy(tiny_folder, tmp_path / f"hf{number}", **{name.replace(".", "__"): weight})
        code, output = run("verify", folder)
        assert (code, f"tensor {name} is not finite" in output) == (1, True), output


@pytest.mark.slow
def test_a_dtype_that_is_too_small_is_an_error_that_names_the_tensor(tiny_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(tiny_folder / "model.safetensors")[name]
    weight[0, 0] = 1e6
    folder = changed_copy(tiny_folder, tmp_path / "hf", **{name.replace(".", "__"): weight})
    import_folder(folder, tmp_path / "megatron", progress=False)
    for command in (["import", folder], ["export", tmp_path / "megatron"]):
        code, output = run(*command, tmp_path / "out", "--dtype", "float16")
        assert (code, "is not finite as float16" in output, "beyond 65504" in output) == (2, True, True), output
        assert not (tmp_path / "out").exists()
    assert run("import", folder, tmp_path / "out", "--dtype", "bfloat16")[0] == 0
