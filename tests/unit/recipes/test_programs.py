"""The recipes as programs, in NeMo-Run's own environment: dry runs, factories, exit codes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
LAUNCHER = REPOSITORY / ".venv-recipes" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not LAUNCHER.exists(), reason="no .venv-recipes: make recipes builds NeMo-Run's environment"
)


def recipe(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NEMORUN_HOME": str(home), "COLUMNS": "200"}
    command = [str(LAUNCHER), str(REPOSITORY / "recipes" / arguments[0]), *arguments[1:]]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_launcher_needs_no_torch():
    program = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('vllm'))"
    done = subprocess.run([str(LAUNCHER), "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None None"


@pytest.mark.slow
def test_dry_run_of_the_pipeline_on_slurm(tmp_path):
    stages = [f"--{stage}=recipes/demo/{stage}.toml" for stage in ("sft", "rl", "eval")]
    slurm = [f"--slurm={setting}" for setting in ("account=team", "partition=gpu", "rl.nodes=4", "rl.gpus_per_node=8")]
    done = recipe(tmp_path, "pipeline.py", *stages, "--executor=slurm", *slurm, "--dry-run", "rl:rl.steps=5")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=4" in done.stdout
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert done.stdout.count("#SBATCH --account=team") == 3
    assert done.stdout.count("#SBATCH --kill-on-invalid-dep=yes") == 3
    assert "--nodes=1 --ntasks=1 --overlap" in done.stdout
    assert "launch rl " in done.stdout
    assert "rl.steps=5" in done.stdout
    assert not list(tmp_path.glob("experiments/*/*"))  # a dry run leaves nothing


@pytest.mark.slow
def test_dry_run_on_this_machine(tmp_path):
    done = recipe(tmp_path, "rl_stage.py", "--run=recipes/demo/rl.toml", "--dry-run", "rl.steps=5")
    assert done.returncode == 0, done.stderr
    assert "launch --local rl" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft_stage.py", "--run=none.toml"], "none.toml does not exist"),
        (["eval.py", "--run=recipes/demo/eval.toml", "rl.stepz=1"], "did you mean 'steps'"),
        (["rl_stage.py", "--run=recipes/demo/rl.toml", "--executor=slurm"], "no account"),
        (["rl_stage.py", "--run=recipes/demo/rl.toml", "--python=/none"], "/none does not exist"),
        (["pipeline.py"], "no stage"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = recipe(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


FACTORIES = """
import sys
sys.path.insert(0, "recipes")
import fiddle
import nemo_run as run
from launching import factories
assert isinstance(fiddle.build(factories.local_machine()), run.LocalExecutor)
job = fiddle.build(factories.slurm_job("team", nodes=3, partition="gpu"))
assert (job.account, job.nodes, job.partition, job.tunnel.job_dir) == ("team", 3, "gpu", ""), job
assert job.additional_parameters == {"kill-on-invalid-dep": "yes"}
script = fiddle.build(factories.stage_script("rl", "recipes/demo/rl.toml", ["rl.steps=2"], sys.executable))
assert "launch rl" in script.inline and "rl.steps=2" in script.inline, script
print("ok")
"""


@pytest.mark.slow
def test_factories(tmp_path):
    environment = {**os.environ, "NEMORUN_HOME": str(tmp_path)}
    command = [str(LAUNCHER), "-c", FACTORIES]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("ok"), done.stderr
