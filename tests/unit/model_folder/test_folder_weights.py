"""A folder is what its config.json says, or it is refused: names, shapes, spellings, layouts and dtypes of tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import config, metas, write_folder, write_weights
from typer.testing import CliRunner

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.conversion.convert_commands import app
from megatron_r1reward.conversion.inspect_folder import inspect
from megatron_r1reward.launch.stage_models import model_problems
from megatron_r1reward.model_folder.dtypes import check_dtype, config_for
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.types import TensorMeta

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_agrees_with_its_configuration_is_read(family: str, tmp_path: Path) -> None:
    weights = read_folder_weights(write_folder(tmp_path, family))
    assert set(weights.on_disk) == set(weights.table.hf_shapes)
    assert inspect(tmp_path)["family"] == family


@pytest.mark.parametrize(
    ("family", "part", "key", "value", "named"),
    [
        ("qwen2_5_vl", "", "vocab_size", 30, r"embed_tokens.weight \[26, 32\] instead of \[30, 32\]"),
        ("qwen2_5_vl", "", "intermediate_size", 48, r"gate_proj.weight \[40, 32\] instead of \[48, 32\]"),
        ("qwen2_5_vl", "", "num_hidden_layers", 1, "unknown: model.layers.1"),
        ("qwen2_5_vl", "", "num_hidden_layers", 3, "missing: model.layers.2"),
        ("qwen2_5_vl", "", "tie_word_embeddings", True, None),
        ("qwen2_5_vl", "vision_config", "intermediate_size", 28, r"\[24, 32\] instead of \[28, 32\]"),
        ("qwen2_5_vl", "vision_config", "out_hidden_size", 48, "out_hidden_size 48 is not the text's hidden_size 32"),
        ("qwen3_vl", "text_config", "head_dim", 16, "mrope_section"),
        ("qwen3_vl", "vision_config", "num_position_embeddings", 25, r"pos_embed.weight \[16, 32\]"),
        ("qwen3_vl_moe", "text_config", "num_experts", 8, r"\[4, 32, 24\] instead of \[8, 32, 24\]"),
        ("qwen3_vl_moe", "text_config", "moe_intermediate_size", 16, r"\[4, 32, 24\] instead of \[4, 32, 32\]"),
    ],
)
def test_a_configuration_of_another_size_is_refused_everywhere(
    family: str, part: str, key: str, value: Any, named: str | None, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "hf", family)
    tree = config(family)
    (tree[part] if part else tree)[key] = value
    (folder / "config.json").write_text(json.dumps(tree))
    if named is None:  # a tied folder may hold the head besides
        read_folder_weights(folder)
        return
    with pytest.raises(ValueError, match=named):
        read_folder_weights(folder)
    for command in (["inspect", folder], ["verify", folder], ["import", folder, tmp_path / "out"]):
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"model__embed_tokens__weight": (20, 32)},
            r"embed_tokens.weight \[20, 32\] instead of \[26, 32\].*vocab_size",
        ),
        ({"lm_head__weight": (28, 32)}, r"lm_head.weight \[28, 32\]"),
        ({"model__layers__0__mlp__down_proj__weight": (40, 32)}, r"down_proj.weight \[40, 32\] instead of \[32, 40\]"),
        ({"model__layers__7__norm__weight": (32,)}, "1 unknown: model.layers.7.norm.weight"),
        ({"model__language_model__norm__weight": (32,)}, "1 double"),
    ],
)
def test_tensors_of_another_shape_or_name_are_refused(
    changed: dict[str, tuple[int, ...]], named: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path)
    write_weights(folder, metas(config(), **changed))
    with pytest.raises(ValueError, match=named):
        read_folder_weights(folder)


def test_rotary_buffers_are_no_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    buffers = {"model__rotary_emb__inv_freq": (4,), "visual__rotary_pos_emb__inv_freq": (4,)}
    write_weights(folder, metas(config(), **buffers))
    assert read_folder_weights(folder).extra == {name.replace("__", ".") for name in buffers}


def moved_experts(separate: bool) -> list[TensorMeta]:
    found = []
    for meta in metas(config("qwen3_vl_moe")):
        if ".experts." not in meta.name:
            found.append(meta)
        elif not separate:
            found.append(TensorMeta(name=meta.name, dtype=meta.dtype, shape=(4, meta.shape[2], meta.shape[1])))
        else:
            prefix, stacked = meta.name.split(".experts.")
            for name in ("gate_proj", "up_proj") if stacked == "gate_up_proj" else ("down_proj",):
                shape = (12, 32) if name != "down_proj" else (32, 12)
                found += [
                    TensorMeta(name=f"{prefix}.experts.{expert}.{name}.weight", dtype=meta.dtype, shape=shape)
                    for expert in range(4)
                ]
    return found


@pytest.mark.parametrize("separate", [False, True])
def test_experts_are_read_in_every_published_layout(separate: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "qwen3_vl_moe")
    write_weights(folder, moved_experts(separate))
    table = read_folder_weights(folder).table
    assert len({entry.megatron for entry in table}) == len(table)
    assert {entry.stacked for entry in table if entry.expert is not None} == {not separate}
    run = {"run": {"output_dir": "x"}, "model": {"path": str(folder)}, "data": {"train": "x"}}
    config_of_rl = RunConfig.model_validate(run | {"rl": {}, "reward": {"use_judge": False}})
    assert not [text for _, _, text in model_problems(config_of_rl, "rl") if "expert" in text]  # servers read them, too
    assert [*model_problems(config_of_rl, "sft")] == []


def test_shards_without_an_index_and_what_is_no_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    parts = metas(config())
    write_weights(folder, parts[::2], "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors and model.*index.json are missing"):
        read_folder_weights(folder)
    write_weights(folder, parts[1::2], "model-00002-of-00002.safetensors")
    assert len(read_folder_weights(folder).files) == 2
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter, no model: merge it"):
        read_folder_weights(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_folder_weights(folder)


def test_dtypes_are_those_of_weights_and_the_configuration_names_them(tmp_path: Path) -> None:
    for name in ("bf16", "int32", "int8", "bool", "float8_e4m3fn", "nonsense"):
        with pytest.raises(ValueError, match="give one of bfloat16, float16, float32"):
            check_dtype(name)
        result = CliRunner().invoke(app, ["import", str(tmp_path), str(tmp_path / "out"), "--dtype", name])
        assert result.exit_code == 2
    flat = json.dumps(config())
    assert config_for(flat, ["bfloat16"]) == flat
    assert config_for(flat, ["bfloat16", "float32"]) == flat
    assert json.loads(config_for(flat, ["float32"]))["torch_dtype"] == "float32"
    nested = json.loads(config_for(json.dumps(config("qwen3_vl")), ["float16"]))
    assert (nested["torch_dtype"], nested["text_config"]["dtype"]) == ("float16", "float16")


def test_inspecting_a_folder_starts_without_torch(tmp_path: Path) -> None:
    """torch, transformers and megatron-core take seconds to import; the headers of a folder need none of them."""
    folder = write_folder(tmp_path)
    program = (
        "import sys; from megatron_r1reward.cli import app; "
        f"app(['convert', 'inspect', {str(folder)!r}], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'megatron.core'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "qwen2_5_vl" in output
    assert output.splitlines()[-1] == "[]"
