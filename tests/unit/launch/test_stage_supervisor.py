"""One life with small real processes in the places of trainer and server: who is blamed, and that all end together."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from waiting import wait_until

from megatron_r1reward.cluster.placement import Placement
from megatron_r1reward.config.schema import ClusterSection, ServerSection
from megatron_r1reward.launch import supervisor
from megatron_r1reward.launch.exit_report import EXIT_LOST_NODE, EXIT_STALLED, EXIT_TIME, EXIT_UNFINISHED
from megatron_r1reward.launch.local_steps import LocalLauncher
from megatron_r1reward.launch.supervisor import Plan, Supervisor, WalltimeGuard
from megatron_r1reward.run_dir import Address, Component, ExitReport, Heartbeat, RunDir, RunInfo
from megatron_r1reward.servers.component import ComponentServer
from megatron_r1reward.servers.group import ServerGroup

BEAT = """
import json, os, signal, sys, time
def beat(phase, step=5, saved=5, first=0, age=0.0):
    row = dict(component="trainer", host="h", pid=os.getpid(), time=time.time() - age, phase=phase, step=step,
               total_steps=9, first_step=first, longest_step_s=0.1, longest_save_s=0.1, saved_step=saved)
    open("{live}/b", "w").write(json.dumps(row)); os.rename("{live}/b", "{live}/trainer.heartbeat.json")
"""
OBEY = "while not os.path.exists('{live}/stop.json'): time.sleep(0.02)\nbeat('stopped')"
# From the trainer, so that neither it nor the supervisor's handlers can be missing yet.
TELL = "beat('training'); os.kill(os.getppid(), signal.{signal})\n"
FOR_EVER = "time.sleep(600)"


class OneLife:
    """A stage whose components run the given Python texts."""

    def __init__(self, root: Path, *, ends: float | None = None, life: int = 0, launcher=LocalLauncher, **section):
        self.run = RunDir(root=root)
        self.run.live.mkdir(parents=True)
        self.section = ClusterSection(**{"grace_s": 2, **section})
        self.ends, self.life, self.launcher = ends, life, launcher
        self.watch: Callable[[], ServerGroup] | None = None
        self.drains = False

    def __call__(self, trainer: str, *, tasks: int = 1, server: str | None = None, resumes: bool = True) -> ExitReport:
        texts = {"trainer": BEAT + trainer}
        placements = [self._placement("trainer", "driver", tasks)]
        if server is not None:
            texts["rollout-0"] = server
            placements.insert(0, self._placement("rollout-0", "rollout", 1))
        info = RunInfo(
            stage="rl", life=self.life, launcher="local", host="h", pid=os.getpid(), started=time.time(), ends=self.ends
        )

        def command(placement: Placement, start: int) -> list[str]:
            text = texts[placement.component.name].replace("{live}", str(self.run.live))
            return [sys.executable, "-c", text.replace("{start}", str(start))]

        plan = Plan(
            info=info, placements=tuple(placements), command=command, startup_timeout_s=120, resumes=resumes,
            requeues=resumes, finished=self.run.done.exists, watch=self.watch, drains=self.drains,
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
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


@pytest.mark.slow
def test_the_first_failing_rank_is_the_cause_and_ends_the_others(tmp_path: Path) -> None:
    report = OneLife(tmp_path)(
        f"\nif os.environ['RANK'] == '2': print('out of cheese'); sys.exit(13)\n{FOR_EVER}", tasks=3
    )
    assert (report.outcome, report.code, report.reason) == ("failed", 13, "trainer: task 2 exited with code 13")
    assert report.log_tail == ("out of cheese",)
    assert ExitReport.read(tmp_path / "exit.json") == report == ExitReport.read(tmp_path / "logs-0" / "exit.json")


@pytest.mark.slow
def test_a_server_that_dies_at_start_keeps_the_trainer_from_starting(tmp_path: Path) -> None:
    report = OneLife(tmp_path)("", server="import sys; sys.exit('no such model')")
    assert (report.code, report.component, report.log_tail) == (1, "rollout-0", ("no such model",))
    assert not (tmp_path / "logs-0" / "trainer.log").exists()


@pytest.mark.slow
def test_a_server_that_dies_with_the_trainer_is_the_cause(
    tmp_path: Path, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer is gone first, and the server a moment later; for the supervisor no time passes until it is."""
    life = OneLife(tmp_path)
    publish(life.run, server_url)
    began, step_id = time.time(), life.run.step_id("rollout-0")

    def now() -> float:
        """The wall clock, which stands still while the server runs."""
        with suppress(FileNotFoundError, psutil.NoSuchProcess):  # not started yet; gone
            if psutil.Process(int(step_id.read_text().split()[1])).status() != psutil.STATUS_ZOMBIE:
                return began
        return time.time()

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(time=now, sleep=time.sleep))
    report = life(
        "open('{live}/left', 'w'); sys.exit(3)",
        server="import os, sys, time\nwhile not os.path.exists('{live}/left'): time.sleep(0.02)\n"
        "time.sleep(0.5); sys.exit(9)",
    )
    assert (report.code, report.component) == (9, "rollout-0")


@pytest.mark.slow
def test_a_service_finishes_its_work_before_its_servers_end(tmp_path: Path, server_url: str) -> None:
    life = OneLife(tmp_path, grace_s=60)
    life.drains = True
    publish(life.run, server_url)
    told = "signal.signal(signal.SIGTERM, lambda *_: ({}, sys.exit(0)))\n"
    working = "time.sleep(0.5), open('{live}/answered', 'w').write(str(os.path.exists('{live}/server-gone')))"
    report = life(
        f"{told.format(working)}os.kill(os.getppid(), signal.SIGINT)\n{FOR_EVER}",
        server="import signal, sys, time\n" + told.format("open('{live}/server-gone', 'w')") + FOR_EVER,
    )
    assert report.outcome == "cancelled"
    assert (life.run.live / "answered").read_text() == "False"
    assert (life.run.live / "server-gone").exists()


# A server that answers /health and completes requests, and what it does once it has published its address.
SERVER = """
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"{}")
    do_POST = do_GET
    def log_message(self, *args): pass
http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=http.serve_forever, daemon=True).start()
print("start {start}", flush=True)
row = dict(component="rollout-0", url=f"http://127.0.0.1:{http.server_port}", served_name="policy", host="h",
           ready_at=time.time(), start={start})
open("{live}/a", "w").write(json.dumps(row)); os.rename("{live}/a", "{live}/rollout-0.address.json")
"""
BEGUN = "while not os.path.exists('{live}/begun'): time.sleep(0.02)\n"
WAITS_FOR_NEW = (
    "open('{live}/begun', 'w')\n"
    "def start(): return json.load(open('{live}/rollout-0.address.json'))['start']\n"
    "while start() < 1 or '\"ready\"' not in open('{live}/rollout-servers.json').read(): time.sleep(0.05)\n"
    "open('{live}/../DONE', 'w')"
)


def life_with_server(root: Path, **limits: float) -> OneLife:
    """The group of servers that a driver would have is in this process."""
    life = OneLife(root)
    section = ServerSection(health_interval_s=0.1, health_timeout_s=3.0, health_failures=1, **limits)

    def watch() -> ServerGroup:
        server = ComponentServer(life.run, "rollout-0", section, token=None)
        status = life.run.live / "rollout-servers.json"
        return ServerGroup(section, name="rollout", servers=[server], served_name="policy", status_file=status)

    life.watch = watch
    return life


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["sys.exit(9)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_server_that_dies_or_hangs_is_started_again(tmp_path: Path, accident: str) -> None:
    life = life_with_server(tmp_path)
    report = life(WAITS_FOR_NEW, server=f"{SERVER}{BEGUN}if {{start}} == 0: {accident}\n{FOR_EVER}", resumes=False)
    assert report.outcome == "done", report
    log = (tmp_path / "logs-0" / "rollout-0.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("start")] == ["start 0", "start 1"], "one log"


@pytest.mark.slow
def test_what_cannot_be_mended_ends_the_life_with_its_reason(tmp_path: Path) -> None:
    life = life_with_server(tmp_path, max_restarts=2)
    report = life(
        f"open('{{live}}/begun', 'w'); {FOR_EVER}",
        server=f"import sys, os, time\nif {{start}}: print('no memory'); sys.exit(7)\n{SERVER}{BEGUN}sys.exit(9)",
    )
    assert (report.outcome, report.code, report.component) == ("failed", 7, "rollout-0")
    assert report.reason.startswith("rollout-0 given up after 2 restarts: rollout-0: exited with code 7")
    assert report.log_tail[-1] == "no memory"


def test_an_address_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_r1reward.network.server_api._PAUSE_S", 0.01)
    life = OneLife(tmp_path)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        publish(life.run, f"http://127.0.0.1:{bound.getsockname()[1]}")
        report = life("", server=f"import time; {FOR_EVER}")
    assert "cannot be reached" in report.reason


def test_stop_request_ends_with_75(tmp_path: Path) -> None:
    report = OneLife(tmp_path)(TELL.replace("{signal}", "SIGUSR1") + OBEY)
    assert (report.outcome, report.code, report.saved_step) == ("requeue", 75, 5)


def test_the_time_limit_is_anticipated(tmp_path: Path) -> None:
    report = OneLife(tmp_path, ends=time.time() + 300.5, walltime_margin_s=300)("beat('training')\n" + OBEY)
    assert (report.outcome, report.code, report.saved_step) == ("requeue", 75, 5)
    assert "the time limit is " in report.reason


def test_turns_that_bring_nothing_come_to_an_end(tmp_path: Path) -> None:
    for life in (0, 1):
        earlier = ExitReport(outcome="requeue", code=75, reason="x", life=life, time=0.0, saved_step=5)
        earlier.write(tmp_path / f"logs-{life}" / "exit.json")
    obey = OBEY.replace("'stopped'", "'stopped', first=5")
    report = OneLife(tmp_path, life=2)(TELL.replace("{signal}", "SIGUSR1") + obey)
    assert (report.outcome, report.code) == ("failed", EXIT_TIME)
    assert "3 turns in a row" in report.reason


def test_a_hang_leaves_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = OneLife(tmp_path, stall_timeout_s=1)

    def sleep(seconds: float) -> None:
        """Until the stacks have been written, however long that takes."""
        if seconds == supervisor._STACK_DUMP_S:
            wait_until(lambda: "stuck_in_a_collective" in life.run.log(0, "trainer").read_text())
        else:
            time.sleep(seconds)

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(time=time.time, sleep=sleep))
    report = life(
        "import faulthandler; faulthandler.register(signal.SIGUSR2)\n"
        f"def stuck_in_a_collective(): beat('training', age=100); {FOR_EVER}\n"
        "stuck_in_a_collective()"
    )
    assert (report.outcome, report.code) == ("failed", EXIT_STALLED)
    assert any("stuck_in_a_collective" in line for line in report.log_tail)


def test_sigterm_is_passed_on_and_recorded(tmp_path: Path) -> None:
    report = OneLife(tmp_path)(TELL.replace("{signal}", "SIGTERM") + FOR_EVER)
    assert (report.outcome, report.code) == ("cancelled", 143)


class LosesANode(LocalLauncher):
    def lost_nodes(self) -> tuple[str, ...]:
        return ("n2",)


@pytest.mark.slow
def test_a_lost_node_asks_for_another_turn(tmp_path: Path) -> None:
    report = OneLife(tmp_path, launcher=LosesANode)("beat('training'); sys.exit(1)")
    assert (report.outcome, report.code) == ("requeue", EXIT_LOST_NODE)
    assert "n2" in report.reason


@pytest.mark.slow
def test_nobody_is_left(tmp_path: Path) -> None:
    """Also one that ignores SIGTERM."""
    marker = str(tmp_path)
    OneLife(tmp_path, grace_s=0.5)(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); '{marker}'\n"
        "if os.environ['RANK'] == '0': open('{live}/deaf', 'w')\n"
        "while not os.path.exists('{live}/deaf'): time.sleep(0.02)\n"
        f"if os.environ['RANK'] == '1': sys.exit(1)\n{FOR_EVER}",
        tasks=2,
    )
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not any(marker in word for command in commands for word in command or ())


def test_walltime_guard_counts_from_the_end_of_the_job() -> None:
    guard = WalltimeGuard(ends=1000.0, margin_s=100, grace_s=30)
    assert guard.latest_stop(None) == 900
    beat = Heartbeat(
        component="trainer", host="h", pid=1, time=0.0, phase="training", step=3, longest_step_s=50, longest_save_s=25
    )
    assert guard.latest_stop(beat) == pytest.approx(900 - 1.2 * 75)
    assert guard.last_moment() == 970
    assert WalltimeGuard(ends=None, margin_s=1, grace_s=1).latest_stop(beat) is None
