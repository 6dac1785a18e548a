"""The doctor where it is meant to work: on a login node of a real cluster, and inside a job of several nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import REPOSITORY, Cluster, tool

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
DOCTOR = [sys.executable, "-m", "megatron_r1reward.cli", "doctor", "--quick", "--json"]


def in_job(folder: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of the doctor in a job on n1 and n2."""
    output = folder.parent / f"{folder.name}.json"
    line = " ".join([*DOCTOR, "--folder", str(folder), ">", str(output)])
    shape = ["--nodes=2", "--nodelist=n1,n2", "--oversubscribe", "--mem=1000", "--time=10", "--cpus-per-task=2"]
    command = ["sbatch", "--wait", "--parsable", *shape, f"--chdir={REPOSITORY}", f"--output={folder.parent}/%j.out"]
    done = subprocess.run([*command, "--wrap", line], capture_output=True, text=True, timeout=1500, check=False)
    return done.returncode, json.loads(output.read_text())


def by_check(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in tree["findings"]}


def test_on_a_login_node(cluster: Cluster, tmp_path: Path) -> None:
    done = subprocess.run([*DOCTOR, "--folder", str(tmp_path)], capture_output=True, text=True, check=False)
    tree = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert tree["place"] == "login node"
    found = by_check(tree)
    for check in ("controller", "version", "accounting", "requeue", "steps", "gres", "partitions", "containers"):
        assert found[f"slurm.{check}"]["level"] == "ok", found[f"slurm.{check}"]


def test_in_a_job_every_node_answers(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shared")
    code, tree = in_job(folder)
    assert code == 0, tree
    assert tree["place"] == "job"
    found = by_check(tree)
    assert found["nodes.answer"]["message"] == "2 of 2 nodes answered"
    assert found["nodes.versions"]["level"] == "ok"
    assert (found["storage.shared"]["level"], found["nodes.connect"]["level"]) == ("ok", "ok")
    assert found["slurm.job"]["level"] == "ok"
    names = [finding for finding in tree["findings"] if finding["check"] == "network.name"]
    assert {finding["node"] for finding in names} == {"n1", "n2"}  # what nodes say differently is said per node


@pytest.fixture
def covered_on_n2(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is another one on the second node."""
    folder = tmp_path_factory.mktemp("covered")
    pid = (cluster.config.parents[1] / "run" / "slurmd-n2.pid").read_text().strip()
    tool("nsenter", "-m", "-t", pid, "mount", "-t", "tmpfs", "none", str(folder))
    yield folder
    tool("nsenter", "-m", "-t", pid, "umount", str(folder))


def test_a_folder_that_is_not_shared_is_an_error_on_that_node(covered_on_n2: Path) -> None:
    code, tree = in_job(covered_on_n2)
    assert code == 1
    errors = [finding for finding in tree["findings"] if finding["level"] == "error"]
    assert [(finding["check"], finding["node"]) for finding in errors] == [("storage.shared", "n2")]
    assert "file system that all nodes mount" in errors[0]["fix"]


def test_status_of_a_job_that_slurm_has_forgotten(cluster: Cluster, tmp_path: Path) -> None:
    from megatron_r1reward.run_dir import RunDir, RunInfo
    from megatron_r1reward.status.read import read_status

    info = RunInfo(
        stage="rl", life=0, launcher="slurm", host="n1", pid=os.getpid(), started=0.0, ends=None, job_id="999999"
    )
    info.write(RunDir(root=tmp_path).run_info)
    assert read_status(tmp_path).state == "died"
