"""A torn file beside the weights is named by every command that reads or copies the folder; what is no model folder
is named for what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from folders import config, write_folder
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.conversion.convert import import_folder
from megatron_r1reward.model_folder.beside_weights import chat_template, damaged_files
from megatron_r1reward.model_folder.examine import folder_problems, served_problems
from megatron_r1reward.model_folder.other_folder import instead_of_model

OBJECTS = {
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "preprocessor_config.json": None,
    "processor_config.json": {"image_processor": {}},
    "video_preprocessor_config.json": {"size": {"shortest_edge": 1}},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "generation_config.json": {"eos_token_id": 24},
    "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    "added_tokens.json": {"<|im_end|>": 24},
    "vocab.json": {"a": 0},
    "reward_model.json": {"template": "{question}{answer1}{answer2}"},
}
TEXTS = {"chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}", "merges.txt": "a b\n"}


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("whole") / "hf")
    for name, tree in OBJECTS.items():
        if tree is not None:
            (folder / name).write_text(json.dumps(tree))
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def imported(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "megatron"
    import_folder(whole, out, progress=False)
    return out


def test_a_whole_folder_is_whole(whole: Path, imported: Path) -> None:
    assert list(damaged_files(whole)) == []
    assert list(folder_problems(whole)) == []
    assert list(served_problems(whole)) == []
    for folder in (whole, imported):
        assert run("convert", "verify", folder) == (0, f"{folder}: intact\n")
        assert run("convert", "inspect", folder)[0] == 0


@pytest.mark.parametrize("name", [*OBJECTS, *TEXTS, "model.safetensors.index.json", "config.json"])
def test_a_torn_file_is_named_by_every_command(name: str, whole: Path, imported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    path = folder / name
    content = path.read_bytes() if path.exists() else b'{"weight_map": {"a": "model.safetensors"}}'
    # Text that is cut is text, so there a byte that is none; a template that is cut lacks its end.
    path.write_bytes(b"a \xff b" if name == "merges.txt" else content[: len(content) // 2])
    word = "the chat template" if name == "chat_template.jinja" else name
    assert any(word in line for line in folder_problems(folder)), list(folder_problems(folder))
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[run]\noutput_dir = "{tmp_path}/run"\n[model]\npath = "{folder}"\n[data]\ntrain = "x"\n[sft]\nsteps = 1\n'
    )
    commands: list[tuple[object, ...]] = [
        ("convert", "inspect", folder),
        ("convert", "verify", folder),
        ("convert", "import", folder, tmp_path / "out"),
        ("convert", "import", "--dry-run", folder, tmp_path / "out"),
        ("convert", "export", imported, tmp_path / "out", "--template", folder),
        ("plan", run_file),
        ("sft", run_file),
    ]
    for command in commands:
        code, output = run(*command)
        assert code in (1, 2), (command, output)
        assert word in output, (command, output)
        assert "Traceback" not in output
        assert len(output.strip().splitlines()) <= 2, (command, output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["hf/tokenizer.json", "hf/headers.json", "hf/config.json", ".metadata"])
def test_a_torn_file_of_a_checkpoint_is_named(where: str, imported: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    shutil.copytree(imported, checkpoint)
    content = (checkpoint / where).read_bytes()
    (checkpoint / where).write_bytes(content[: len(content) // 2])
    for command in ("verify", "inspect", "export"):
        code, output = run("convert", command, checkpoint, *([tmp_path / "out"] if command == "export" else []))
        assert code in (1, 2), (command, output)
        assert Path(where).name in output, (command, output)
    assert not (tmp_path / "out").exists()


def test_a_pointer_of_git_lfs_is_no_tokenizer(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n")
    assert [line for line in folder_problems(folder) if "run git lfs pull" in line]


def test_blocks_of_transformers_are_template_syntax(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert list(damaged_files(tmp_path)) == []
    (tmp_path / "chat_template.jinja").write_text("")
    assert chat_template(tmp_path) is None


def test_words_without_numbers_are_no_vocabulary(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    for change in ({"model": {"vocab": {"a": "x"}}}, {"added_tokens": [{"id": [], "content": "x"}]}, {"model": []}):
        tree = json.loads((whole / "tokenizer.json").read_text()) | change
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        assert [line for line in folder_problems(folder) if "holds no vocabulary" in line], change


@pytest.mark.slow
def test_what_is_no_model_folder_is_named_with_what_to_give(whole: Path, imported: Path, tmp_path: Path) -> None:
    def make(path: str, text: str = "x") -> Path:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return tmp_path / path

    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    steps = [make(f"run/checkpoints/step-0000{n}/metadata.json").parent for n in (1, 2)]
    make("exported/hf/config.json")
    make("exported/checkpoints/step-00001/metadata.json")
    make("cache/snapshots/abc/config.json")
    make("models/one/config.json")
    cases: dict[Path, str] = {
        make("a.gguf"): "is a GGUF file",
        make("ggufs/a.gguf").parent: "holds GGUF files",
        make("pytorch_model.bin"): "is a pickle",
        make("lone/model.safetensors"): "is one file of weights: give a folder that holds config.json",
        tmp_path / "lone": "holds no config.json, but weights",
        whole / "model.safetensors": f"is one file of weights: give its folder, {whole}",
        whole / "config.json": f"is a file: give its folder, {whole}",
        imported / "metadata.json": f"is a file: give its folder, {imported}",
        make("run.toml"): "is a run file",
        make("notes.txt"): "is a file: give the folder that holds config.json",
        tmp_path / "gone": "does not exist",
        tmp_path / "link": "is a link to /nowhere/at/all, which is not there",
        tmp_path / "empty": "is an empty folder",
        steps[0].parent: f"holds 2 checkpoints: give one of them, e.g. {steps[1]}",
        steps[0].parent.parent: f"is the folder of a run: give one of its 2 checkpoints, e.g. {steps[1]}",
        tmp_path / "exported": f"give the model that it exported, {tmp_path / 'exported' / 'hf'}",
        tmp_path / "cache": f"give one of them, e.g. {tmp_path / 'cache' / 'snapshots' / 'abc'}",
        tmp_path / "models": f"give one of them, e.g. {tmp_path / 'models' / 'one'}",
        make("out.partial/conversion.jsonl").parent: "is an unfinished conversion",
        make("other/readme.md").parent: "holds no config.json: give a Hugging Face model folder",
    }
    for path, words in cases.items():
        assert words in instead_of_model(path), (path, instead_of_model(path))
        for command in ("inspect", "verify"):
            code, output = run("convert", command, path)
            assert (code, words in output, len(output.strip().splitlines())) == (2, True, 1), (path, output)
    assert "r1reward convert export" in instead_of_model(imported)
    assert any("r1reward convert export" in line for line in folder_problems(imported))


def test_a_file_of_that_name_makes_no_checkpoint_of_a_model(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    (folder / "metadata.json").write_text("{}")
    assert run("convert", "verify", folder) == (0, f"{folder}: intact\n")
    assert config()["model_type"] in run("convert", "inspect", folder)[1]
