"""One life with small real processes in the places of trainer and server: who is blamed, and that all end together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_r1reward.config.schema import ClusterSection
from megatron_r1reward.launch.layout import Placement
from megatron_r1reward.launch.local_steps import LocalLauncher
from megatron_r1reward.launch.supervisor import Plan, Supervisor
from megatron_r1reward.launch.verdict import EXIT_LOST_NODE, EXIT_STALLED, EXIT_TIME, EXIT_UNFINISHED
from megatron_r1reward.launch.walltime import WalltimeGuard
from megatron_r1reward.monitor.run_state import Address, Component, ExitReport, Heartbeat, RunDir, RunInfo

BEAT = """
import json, os, sys, time
def beat(phase, step=5, saved=5, first=0, age=0.0):
    row = dict(component="trainer", host="h", pid=os.getpid(), time=time.time() - age, phase=phase, step=step,
               total_steps=9, first_step=first, longest_step_s=0.1, longest_save_s=0.1, saved_step=saved)
    open("{live}/b", "w").write(json.dumps(row)); os.rename("{live}/b", "{live}/trainer.heartbeat.json")
"""
OBEY = "beat('training')\nwhile not os.path.exists('{live}/stop.json'): time.sleep(0.02)\nbeat('stopped')"


class OneLife:
    """A stage whose components run the given Python texts."""

    def __init__(self, root: Path, *, ends: float | None = None, life: int = 0, launcher=LocalLauncher, **section):
        self.run = RunDir(root=root)
        self.run.live.mkdir(parents=True)
        self.section = ClusterSection(**{"grace_s": 2, **section})
        self.ends, self.life, self.launcher = ends, life, launcher

    def __call__(self, trainer: str, *, tasks: int = 1, server: str | None = None, resumes: bool = True) -> ExitReport:
        texts = {"trainer": BEAT + trainer}
        placements = [self._placement("trainer", "driver", tasks)]
        if server is not None:
            texts["rollout-0"] = server
            placements.insert(0, self._placement("rollout-0", "rollout", 1))
        info = RunInfo(
            stage="rl", life=self.life, launcher="local", host="h", pid=os.getpid(), started=time.time(), ends=self.ends
        )

        def command(placement: Placement) -> list[str]:
            return [sys.executable, "-c", texts[placement.component.name].replace("{live}", str(self.run.live))]

        plan = Plan(
            info=info, placements=tuple(placements), command=command, startup_timeout_s=20, resumes=resumes,
            requeues=resumes, finished=self.run.done.exists,
        )  # fmt: skip
        return Supervisor(self.run, self.section, plan, self.launcher(self.run, token="secret")).run()

    def _placement(self, name: str, kind, tasks: int) -> Placement:
        return Placement(component=Component(name=name, nodes=("h",), tasks=tasks, gpus_per_node=0), kind=kind)


@pytest.fixture
def server_url():
    """A port that answers /health."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def publish(run: RunDir, url: str) -> None:
    Address(component="rollout-0", url=url, served_name="policy", host="h", ready_at=0.0).write(
        run.address("rollout-0")
    )


def test_done_needs_the_done_file(tmp_path: Path) -> None:
    assert OneLife(tmp_path / "a")("open('{live}/../DONE', 'w')").outcome == "done"
    report = OneLife(tmp_path / "b")("print('nothing to do')")
    assert (report.outcome, report.code) == ("failed", EXIT_UNFINISHED)


def test_the_first_failing_rank_is_the_cause_and_ends_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    report = OneLife(tmp_path)(
        "\nif os.environ['RANK'] == '2': print('out of cheese'); sys.exit(13)\ntime.sleep(60)", tasks=3
    )
    assert time.monotonic() - started < 20
    assert (report.outcome, report.code, report.reason) == ("failed", 13, "trainer: task 2 exited with code 13")
    assert report.log_tail == ("out of cheese",)
    assert ExitReport.read(tmp_path / "exit.json") == report == ExitReport.read(tmp_path / "logs-0" / "exit.json")


def test_a_server_that_dies_at_start_keeps_the_trainer_from_starting(tmp_path: Path) -> None:
    report = OneLife(tmp_path)("", server="import sys; sys.exit('no such model')")
    assert (report.code, report.component, report.log_tail) == (1, "rollout-0", ("no such model",))
    assert not (tmp_path / "logs-0" / "trainer.log").exists()


def test_a_server_that_dies_with_the_trainer_is_the_cause(tmp_path: Path, server_url: str) -> None:
    life = OneLife(tmp_path)
    publish(life.run, server_url)
    report = life("time.sleep(0.3); sys.exit(3)", server="import time, sys; time.sleep(0.8); sys.exit(9)")
    assert (report.code, report.component) == (9, "rollout-0")


def test_a_server_that_dies_alone_ends_the_life(tmp_path: Path, server_url: str) -> None:
    """It is not started again, not even where its memory is the trainer's at that time (colocated)."""
    life = OneLife(tmp_path)
    publish(life.run, server_url)
    report = life("time.sleep(60)", server="import time, sys; print('began'); time.sleep(0.8); sys.exit(9)")
    assert (report.outcome, report.code, report.component) == ("failed", 9, "rollout-0")
    assert report.log_tail == ("began",)


def test_an_address_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_r1reward.launch.health._PAUSE_S", 0.01)
    life = OneLife(tmp_path)
    publish(life.run, "http://127.0.0.1:9")
    report = life("", server="import time; time.sleep(60)")
    assert "cannot be reached" in report.reason


def test_stop_request_ends_with_75(tmp_path: Path) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    report = OneLife(tmp_path)(OBEY)
    assert (report.outcome, report.code, report.saved_step) == ("requeue", 75, 5)


def test_the_time_limit_is_anticipated(tmp_path: Path) -> None:
    report = OneLife(tmp_path, ends=time.time() + 4, walltime_margin_s=3)(OBEY)
    assert (report.outcome, report.code) == ("requeue", 75)
    assert "time limit" in report.reason


def test_turns_that_bring_nothing_come_to_an_end(tmp_path: Path) -> None:
    for life in (0, 1):
        earlier = ExitReport(outcome="requeue", code=75, reason="x", life=life, time=0.0, saved_step=5)
        earlier.write(tmp_path / f"logs-{life}" / "exit.json")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    report = OneLife(tmp_path, life=2)(OBEY.replace("'stopped'", "'stopped', first=5"))
    assert (report.outcome, report.code) == ("failed", EXIT_TIME)
    assert "3 turns in a row" in report.reason


def test_a_hang_leaves_stacks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_r1reward.launch.supervisor._STACK_DUMP_S", 0.5)
    report = OneLife(tmp_path, stall_timeout_s=1)(
        "import faulthandler, signal; faulthandler.register(signal.SIGUSR2)\n"
        "def stuck_in_a_collective(): time.sleep(60)\n"
        "beat('training', age=0.5); stuck_in_a_collective()"
    )
    assert (report.outcome, report.code) == ("failed", EXIT_STALLED)
    assert any("stuck_in_a_collective" in line for line in report.log_tail)


def test_sigterm_is_passed_on_and_recorded(tmp_path: Path) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    report = OneLife(tmp_path)("time.sleep(60)")
    assert (report.outcome, report.code) == ("cancelled", 143)


class LosesANode(LocalLauncher):
    def lost_nodes(self) -> tuple[str, ...]:
        return ("n2",)


def test_a_lost_node_asks_for_another_turn(tmp_path: Path) -> None:
    report = OneLife(tmp_path, launcher=LosesANode)("beat('training'); sys.exit(1)")
    assert (report.outcome, report.code) == ("requeue", EXIT_LOST_NODE)
    assert "n2" in report.reason


def test_nobody_is_left(tmp_path: Path) -> None:
    """Also one that ignores SIGTERM."""
    marker = str(tmp_path)
    OneLife(tmp_path, grace_s=0.5)(
        f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); '{marker}'\n"
        "if os.environ['RANK'] == '1': sys.exit(1)\ntime.sleep(60)",
        tasks=2,
    )
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.exists()]
    assert not any(marker.encode() in command for command in commands)


def test_walltime_guard_counts_from_the_end_of_the_job() -> None:
    guard = WalltimeGuard(ends=1000.0, margin_s=100, grace_s=30)
    assert guard.latest_stop(None) == 900
    beat = Heartbeat(
        component="trainer", host="h", pid=1, time=0.0, phase="training", step=3, longest_step_s=50, longest_save_s=25
    )
    assert guard.latest_stop(beat) == pytest.approx(900 - 1.2 * 75)
    assert guard.last_moment() == 970
    assert WalltimeGuard(ends=None, margin_s=1, grace_s=1).latest_stop(beat) is None
