"""Slurm's features, the nodes of a job and the servers of a run; the examination and its exit code."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1reward.doctor import examination, nodes, slurm_features
from megatron_r1reward.doctor.finding import Finding, error, merge_nodes, ok
from megatron_r1reward.run_dir import Address, RunDir
from megatron_r1reward.servers.member import Member, write_status

CONFIG = {
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "ClusterName": "test",
    "GresTypes": "gpu",
    "JobRequeue": "1",
    "ProctrackType": "proctrack/cgroup",
    "SelectType": "select/cons_tres",
    "SLURM_VERSION": "23.11.4",
}


def levels(findings):
    return {finding.check: finding.level for finding in findings}


@pytest.fixture
def site(command):
    """A cluster whose commands answer; `site(GresTypes="(null)")` changes the configuration."""

    def build(*, accounting="exit 0", containers="--container-image", **changes):
        text = "\n".join(f"{key:<24}= {value}" for key, value in (CONFIG | changes).items())
        command("scontrol", f"case $1 in show) cat <<E\n{text}\nE\n;; esac")
        command("sacct", accounting)
        command("sinfo", "echo 'batch*|up|1-00:00:00|4|gpu:8'; echo 'old|down|1:00|2|(null)'")
        command("srun", f"echo '  {containers}=IMAGE'")

    return build


class TestSlurm:
    def test_a_complete_site(self, site):
        site()
        found = {finding.check: finding for finding in slurm_features.check_slurm({})}
        assert {finding.level for finding in found.values()} == {"ok"}
        assert found["slurm.partitions"].message == "batch* (4 nodes, gpu:8, limit 1-00:00:00)"

    @pytest.mark.parametrize(
        ("change", "check", "level"),
        [
            ({"SLURM_VERSION": "20.02.7"}, "slurm.version", "error"),
            ({"AccountingStorageType": "accounting_storage/none"}, "slurm.accounting", "warning"),
            ({"accounting": "echo 'Connection refused' >&2; exit 1"}, "slurm.accounting", "warning"),
            ({"JobRequeue": "0"}, "slurm.requeue", "note"),
            ({"SelectType": "select/linear"}, "slurm.steps", "warning"),
            ({"ProctrackType": "proctrack/linuxproc"}, "slurm.tracking", "warning"),
            ({"GresTypes": "(null)"}, "slurm.gres", "note"),
            ({"containers": "--other"}, "slurm.containers", "note"),
        ],
    )
    def test_what_is_missing(self, site, change, check, level):
        site(**change)
        found = levels(slurm_features.check_slurm({}))
        assert found.pop(check) == level
        assert set(found.values()) == {"ok"}

    def test_no_slurm_and_a_controller_that_is_down(self, monkeypatch, tmp_path, command):
        command("scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1")
        (finding,) = slurm_features.check_slurm({})
        assert (finding.check, finding.level) == ("slurm.controller", "error")
        assert "Unable to contact slurm controller" in finding.message
        monkeypatch.setenv("PATH", str(tmp_path))
        assert levels(slurm_features.check_slurm({})) == {"slurm.commands": "note"}

    def test_a_job_that_would_not_come_back(self, command):
        command("scontrol", "echo 'JobId=7 Requeue=0 Restarts=0 NodeList=n[1-2] TimeLimit=01:00:00'")
        assert levels(slurm_features._this_job("7")) == {"slurm.job": "ok", "slurm.job-requeue": "warning"}


class Clock:
    """The clock of `nodes`, which only its own pauses move; `path` is there from `after_s` on."""

    def __init__(self, monkeypatch, path: Path, after_s: float = math.inf):
        self.now, self.path, self.after_s = 0.0, path, after_s
        monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.after_s:
            self.path.write_text(self.path.name)


class TestNodes:
    def test_what_all_nodes_say_is_said_once(self):
        same = ok("a", "fine")
        bad = error("b", "broken", "repair")
        found = [replace(same, node="n1"), replace(same, node="n2"), replace(bad, node="n2")]
        assert merge_nodes(found, nodes=2) == [same, replace(bad, node="n2")]

    def test_other_versions_and_clocks(self):
        one = {"node": "n1", "versions": {"torch": "2.13.0"}, "time": 100.0}
        two = {"node": "n2", "versions": {"torch": "2.11.0"}, "time": 160.0}
        assert levels(nodes.compare_nodes([one, one | {"node": "n2"}], 99.0, 101.0)) == {"nodes.versions": "ok"}
        found = nodes.compare_nodes([one, two], 99.0, 101.0)
        assert levels(found) == {"nodes.versions": "error", "nodes.clock": "warning"}
        assert "n2" in found[1].message

    def test_reports_survive_being_mixed(self):
        first = {"node": "n1", "text": "a b" * 700}
        second = {"node": "n2", "text": "c" * 1200}
        one, two = nodes.report_lines(first), nodes.report_lines(second)
        assert max(map(len, one + two)) < 600
        mixed = [one[0], two[0], "slurmstepd: noise", *one[1:], *two[1:]]
        assert nodes.read_reports("\n".join(mixed)) == [first, second]
        assert nodes.read_reports("\n".join([*one, *two[:-1]])) == [first]

    def test_a_folder_that_is_not_shared(self, tmp_path, monkeypatch):
        clock = Clock(monkeypatch, tmp_path / "late")
        (tmp_path / "seen").write_text("seen")
        assert nodes.check_canary(tmp_path, "seen").level == "ok"
        assert nodes.check_canary(tmp_path, "elsewhere").level == "error"
        assert 30 < clock.now < 31

    @pytest.mark.parametrize(("after_s", "level"), [(0.4, "ok"), (6.0, "warning")])
    def test_a_canary_that_comes_late(self, tmp_path, monkeypatch, after_s, level):
        Clock(monkeypatch, tmp_path / "late", after_s)
        assert nodes.check_canary(tmp_path, "late").level == level

    def test_a_closed_port(self):
        with nodes._Listener() as listener:
            assert nodes.check_reachable(f"127.0.0.1:{listener.port}").level == "ok"
        assert nodes.check_reachable(f"127.0.0.1:{listener.port}").level == "error"

    def test_a_node_that_does_not_answer(self, tmp_path, command):
        row = ok("a", "fine").to_json() | {"node": "n1"}
        report = {"node": "n1", "time": time.time(), "versions": {}, "findings": [row]}
        lines = "\n".join(["a message of the day", *nodes.report_lines(report)])
        command("srun", f"cat <<'E'\n{lines}\nE\nexit 1")
        environment = {"SLURM_JOB_NUM_NODES": "2", "PATH": os.environ["PATH"]}
        findings = nodes.check_nodes(tmp_path, environment)
        assert Finding(check="a", level="ok", message="fine", node="n1") in findings
        (missing,) = [finding for finding in findings if finding.check == "nodes.answer"]
        assert missing.level == "error"
        assert missing.message.startswith("1 of 2 nodes answered (n1)")
        assert list(tmp_path.glob(".r1reward-canary-*")) == []


class TestServers:
    def publish(self, run: RunDir, component: str, url: str) -> None:
        address = Address(component=component, url=url, served_name="policy", host="n1", ready_at=1.0)
        address.write(run.address(component))

    def test_healthy_dead_and_unreadable(self, tmp_path):
        class Healthy(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, *_):
                pass

        run = RunDir(root=tmp_path)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server, socket.socket() as dead:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            dead.bind(("127.0.0.1", 0))  # not listening
            self.publish(run, "rollout-0", f"http://127.0.0.1:{server.server_port}")
            self.publish(run, "judge-0", f"http://127.0.0.1:{dead.getsockname()[1]}")
            (run.live / "rollout-1.address.json").write_text("{")
            found = levels(examination.check_servers(tmp_path))
            server.shutdown()
        assert found == {"servers.rollout-0": "ok", "servers.judge-0": "error", "servers": "warning"}

    def test_what_the_run_thinks_of_its_servers(self, tmp_path):
        sick = Member(
            name="rollout-1", fixed_url="http://b", state="quarantined", failures=3, last_error="hung\nfor ever"
        )
        well = Member(name="rollout-0", fixed_url="http://a", state="ready", requests=7, weight_version=4)
        write_status(tmp_path / "live" / "rollout-servers.json", [well.status(), sick.status()])
        found = {finding.check: finding for finding in examination.check_servers(tmp_path)}
        assert levels(found.values()) == {"pool.rollout-0": "ok", "pool.rollout-1": "warning"}
        assert found["pool.rollout-0"].message == (
            "http://a is ready: 0 requests in flight, 7 answered, 0 failures, 0 restarts, weight version 4"
        )
        assert found["pool.rollout-1"].message.endswith("3 failures, 0 restarts, its own weights; hung")

    def test_a_run_without_servers_and_a_finished_one(self, tmp_path):
        assert levels(examination.check_servers(tmp_path)) == {"servers": "note"}
        (tmp_path / "DONE").write_text("{}")
        assert levels(examination.check_servers(tmp_path)) == {"servers": "ok"}


def doctor(*arguments, **options):
    command = [sys.executable, "-m", "megatron_r1reward.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
def test_this_machine_passes(tmp_path):
    """Real probes, in the environment that runs these tests."""
    done = doctor("--folder", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout
    tree = json.loads(done.stdout)
    assert tree["worst"] in ("ok", "note", "warning")
    assert {"packages.torch", "imports.vllm", "imports.megatron-core", "storage.canary", "limits.nofile"} <= {
        finding["check"] for finding in tree["findings"]
    }


@pytest.mark.slow
def test_an_error_is_exit_code_1_and_names_its_fix(tmp_path):
    environment = {**os.environ, "NCCL_SOCKET_IFNAME": "nosuch", "COLUMNS": "200"}
    done = doctor("--folder", str(tmp_path), "--quick", env=environment)
    assert done.returncode == 1
    assert "NCCL_SOCKET_IFNAME=nosuch matches none" in done.stdout
    assert "fix: set it to a prefix" in done.stdout


@pytest.mark.slow
def test_a_folder_that_does_not_exist(tmp_path):
    done = doctor("--folder", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "is not a folder" in done.stderr
