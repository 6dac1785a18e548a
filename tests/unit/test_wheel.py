"""The wheel in an environment without the checkout: the commands that a new user tries first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("megatron_r1reward", "recipes", "slurm", "tools", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def call(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and this one's packages behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    # Through the build backend itself, so that nothing is fetched.
    program = "import setuptools.build_meta as backend; print(backend.build_wheel('..'))"
    built = call(sys.executable, "-c", program, folder=source)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    venv = folder / "venv"
    made = call(sys.executable, "-m", "venv", venv, folder=folder)
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    done = call(venv / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=folder)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    hook = call(venv / "bin" / "python", "-m", "megatron_r1reward.torchvision_cpu", "install", folder=folder)
    assert hook.returncode == 0, hook.stderr
    return venv / "bin"


@pytest.mark.slow
def test_it_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = call(installed / "python", "-c", "import megatron_r1reward as m; print(m.__file__)", folder=tmp_path)
    assert done.stdout.startswith(str(installed.parent))


@pytest.mark.slow
def test_a_shipped_run_file_is_planned(installed: Path, tmp_path: Path) -> None:
    listed = call(installed / "r1reward", "recipes", folder=tmp_path).stdout.split()
    assert "recipes/demo/rl.toml" in listed
    assert "recipes/qwen2_5_vl_7b/paper/rl.toml" in listed
    done = call(installed / "r1reward", "plan", "recipes/qwen2_5_vl_7b/paper/rl.toml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fits:" in done.stdout


@pytest.mark.slow
def test_recipes_and_job_scripts_can_be_copied_and_edited(installed: Path, tmp_path: Path) -> None:
    done = call(installed / "r1reward", "recipes", "--out", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("recipes/demo/rl.toml", "recipes/rl_stage.py", "slurm/rl_stage.sh", "tools/convert_checkpoint.py"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    assert os.access(tmp_path / "mine" / "slurm" / "rl_stage.sh", os.X_OK)
    again = call(installed / "r1reward", "recipes", "--out", "mine", folder=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_tiny_model_and_the_doctor(installed: Path, tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Which digit is shown? 0 1 2 3 4 5 6 7 8 9"}
    row = {"message": json.dumps([turn]), "response": "<think>It shows 7.</think><answer>1</answer>"}
    (tmp_path / "texts.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    done = call(installed / "r1reward", "tiny", "--out", "tiny", "--corpus", "texts.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    done = call(installed / "r1reward", "doctor", "--quick", "--json", folder=tmp_path)
    assert '"check": "packages.' in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
