"""Tasks of the recipes: what runs, with which results of the stages before it, and what stops a chain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching.chain import REPOSITORY, Task, convert_task, interpreter, pipeline_tasks, stage_task
from launching.site import read_site, settings_of

DEMO = REPOSITORY / "recipes" / "demo"
STAGES = {"sft": "sft", "judge": "judge", "select": "eval", "rl": "rl", "eval": "eval"}
RUN_FILES = {stage: DEMO / f"{name}.toml" for stage, name in STAGES.items()}
KNOWN = ("account", "nodes", "ntasks_per_node", "time", "exclusive", "mem", "gpus_per_node", "srun_args",
         "additional_parameters", "partition", "container_image", "tunnel", "packager")  # fmt: skip


def overrides_of(task: Task) -> dict[str, str]:
    return dict(part.split("=", 1) for part in task.command if "=" in part and not part.startswith("-"))


def tasks_of(*stages: str, overrides=(), output_dir=Path("/out")) -> dict[str, Task]:
    files = {stage: RUN_FILES[stage] for stage in stages}
    tasks = pipeline_tasks(files, overrides, output_dir=output_dir, python="python", local=False)
    return {task.name: task for task in tasks}


def test_a_stage_is_one_supervised_command():
    task = stage_task("rl", "rl", DEMO / "rl.toml", ["rl.steps=3"], python="/venv/bin/python", local=True)
    assert task.command[:5] == ("/venv/bin/python", "-m", "megatron_r1reward.cli", "launch", "--local")
    assert task.command[5:] == ("rl", str(DEMO / "rl.toml"), "rl.steps=3")
    assert task.run_dir == Path.cwd() / "runs/demo/rl"


def test_a_bad_run_file_is_refused_before_anything_is_submitted():
    with pytest.raises(ValueError, match="unknown key"):
        stage_task("rl", "rl", DEMO / "rl.toml", ["rl.stepz=3"], python="python", local=False)


def test_each_stage_gets_the_results_of_those_before_it():
    tasks = tasks_of("sft", "judge", "select", "rl", "eval")
    assert list(tasks) == ["sft", "judge", "select", "rl", "eval"]
    assert tasks["sft"].after == tasks["judge"].after == ()
    assert tasks["select"].after == ("sft",)
    assert tasks["rl"].after == ("sft", "judge", "select")
    assert overrides_of(tasks["select"])["model.path"] == "/out/sft/hf"
    rl = overrides_of(tasks["rl"])
    assert (rl["model.path"], rl["judge.model_path"]) == ("/out/sft/hf", "/out/judge/hf")
    assert rl["data.select"] == "/out/select/hard.json"
    assert overrides_of(tasks["eval"])["model.path"] == "/out/rl/hf"
    assert tasks["select"].command[4] == "annotate"
    assert tasks["judge"].command[4] == "sft"


def test_without_a_stage_its_result_is_the_run_files():
    tasks = tasks_of("sft", "eval", output_dir=None)
    assert overrides_of(tasks["eval"]) == {"run.output_dir": "runs/demo/eval_rl", "model.path": "runs/demo/sft/hf"}
    assert "model.path" not in overrides_of(tasks_of("rl")["rl"])


def test_overrides_for_all_stages_and_for_one():
    tasks = tasks_of("sft", "rl", overrides=["run.seed=7", "rl:rl.steps=9", "sft:model.path=a:b=c"])
    assert overrides_of(tasks["sft"])["run.seed"] == overrides_of(tasks["rl"])["run.seed"] == "7"
    assert overrides_of(tasks["rl"])["rl.steps"] == "9"
    assert "rl.steps" not in overrides_of(tasks["sft"])
    assert overrides_of(tasks["sft"])["model.path"] == "a:b=c"
    own = tasks_of("sft", "rl", overrides=["rl:run.output_dir=/elsewhere"])
    assert overrides_of(own["rl"])["run.output_dir"] == "/elsewhere"
    with pytest.raises(ValueError, match="is for stage 'eval'"):
        tasks_of("sft", overrides=["eval:run.seed=1"])
    with pytest.raises(ValueError, match="no stage"):
        tasks_of()


def run_script(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "task.sh"
    path.write_text(text)
    return subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)


def test_the_script_runs_where_it_was_submitted_with_this_checkout(tmp_path):
    program = "import os, megatron_r1reward; print(os.getcwd()); print(megatron_r1reward.__file__)"
    folder = tmp_path / "a folder's name"
    folder.mkdir()
    task = Task(name="t", command=(sys.executable, "-c", program), folder=folder)
    done = run_script(task.script(done=tmp_path / "done"), tmp_path)
    assert done.stdout.splitlines() == [str(folder), str(REPOSITORY / "megatron_r1reward" / "__init__.py")]
    assert (tmp_path / "done").exists()


def test_a_failed_task_leaves_no_mark_and_the_next_does_not_start(tmp_path):
    first = Task(name="first", command=("false",), folder=tmp_path)
    assert run_script(first.script(done=tmp_path / "first-done"), tmp_path).returncode == 1
    second = Task(name="second", command=("touch", "started"), folder=tmp_path, after=("first",))
    done = run_script(second.script(wanted=[("first", tmp_path / "first-done")]), tmp_path)
    assert done.returncode == 1
    assert "second is not started: first failed" in done.stderr
    assert not (tmp_path / "started").exists()


def test_interpreter(tmp_path):
    assert interpreter(Path(sys.executable)) == sys.executable
    with pytest.raises(ValueError, match="does not exist"):
        interpreter(tmp_path / "python")


@pytest.mark.skipif(
    (REPOSITORY / "tools" / "convert_checkpoint.py").exists(), reason="the program exists in this checkout"
)
def test_conversion_needs_its_program():
    with pytest.raises(ValueError, match="checkout"):
        convert_task(["inspect"], python="python")


class TestSite:
    SITE = """
[slurm]
account = "team"
partition = "gpu"
nodes = 2
[slurm.rl]
nodes = 8
additional_parameters = { reservation = "mine" }
"""

    def site(self, tmp_path: Path) -> dict:
        path = tmp_path / "site.toml"
        path.write_text(self.SITE)
        return read_site(path)

    def test_the_later_and_the_nearer_win(self, tmp_path):
        site = self.site(tmp_path)
        assert settings_of("sft", site, (), KNOWN)["nodes"] == 2
        rl = settings_of("rl", site, (), KNOWN)
        assert (rl["nodes"], rl["account"]) == (8, "team")
        assert rl["additional_parameters"] == {"kill-on-invalid-dep": "yes", "reservation": "mine"}
        assert settings_of("rl", site, ["nodes=3", "sft.nodes=9"], KNOWN)["nodes"] == 3

    def test_values(self):
        chosen = settings_of("rl", {}, ["time=00:10:00", "exclusive=false", "gpus_per_node=8"], KNOWN)
        assert (chosen["time"], chosen["gpus_per_node"]) == ("00:10:00", 8)
        assert "exclusive" not in chosen
        assert "--overlap" in chosen["srun_args"]  # the supervisor's step must not hold the job's resources

    def test_what_is_refused(self, tmp_path):
        for option, message in {
            "nodes": "not of the form",
            "node=3": "did you mean 'nodes'",
            "container_image=x": "cluster.container_image",
            "tunnel=x": "the recipes set it",
        }.items():
            with pytest.raises(ValueError, match=message):
                settings_of("rl", {}, [option], KNOWN)
        with pytest.raises(ValueError, match="does not exist"):
            read_site(tmp_path / "none.toml")
        (tmp_path / "bad.toml").write_text("[slurrm]\n")
        with pytest.raises(ValueError, match="slurrm"):
            read_site(tmp_path / "bad.toml")
