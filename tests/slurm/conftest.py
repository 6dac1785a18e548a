"""A real Slurm cluster on this machine: slurmctld, accounting, seven virtual nodes with fake GPUs, a pyxis stand-in.

Scenarios (one or more real jobs each) run three at a time in the background, since much of what they do is waiting; the
tests look at how they ended. Only the scenarios of selected tests run, and those that they compare with.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import recipe_runs
import scenarios as stories
from jobs import Cluster, tool
from run_files import write_inputs
from scenarios import Bench

SCRIPT = Path(__file__).parent / "cluster.sh"
NODES = 7
INSTALL = "as root: bash tests/slurm/cluster.sh install (Debian/Ubuntu packages of Slurm, MUNGE and MariaDB)"

# In this order: first the chain whose parts others begin with, then what takes long, the shortest last.
SCENARIOS: dict[str, Callable[[Bench], Any]] = {
    story.__name__: story
    for story in (
        stories.reference,
        stories.preempted_out_of_time_then_cancelled,
        stories.node_lost,
        recipe_runs.nemo_slurm,
        stories.rl_servers_hang_and_die,
        recipe_runs.nemo_local,
        stories.served_and_drained,
        stories.crashed_in_a_chain,
        recipe_runs.nemo_slurm_fails,
        stories.rl_server_does_not_start,
        recipe_runs.nemo_local_fails,
    )
}
COMPARED = ("preempted_out_of_time_then_cancelled", "node_lost", "rl_servers_hang_and_die")
# Whose ends a scenario begins with or is compared with.
NEEDS: dict[str, tuple[str, ...]] = dict.fromkeys((*COMPARED, "served_and_drained"), ("reference",))
NEEDS["nemo_local"] = ("reference", "nemo_slurm")


TIMELINE = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "scenario(name): the background scenario whose end a test looks at")


def _obstacle() -> str | None:
    """Why no cluster can be started here; installs the packages where root may."""
    if os.geteuid() != 0:
        return "virtual nodes need root"
    if not all(shutil.which(name) for name in ("slurmctld", "slurmdbd", "mariadbd", "munged", "gcc")):
        if shutil.which("apt-get") is None:
            return f"Slurm is not installed, and there is no apt-get: install slurmctld, slurmd, slurmdbd, {INSTALL}"
        done = subprocess.run(["bash", str(SCRIPT), "install"], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"Slurm could not be installed ({done.stderr.strip().splitlines()[-1:]}): {INSTALL}"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        return "namespaces (unshare --uts --mount) are not allowed here: run in a privileged container or on a machine"
    return None


def _free_port_base() -> int:
    for base in range(21_000, 30_000, 50):
        sockets = [socket.socket() for _ in range(NODES + 12)]
        try:
            for offset, probe in enumerate(sockets):
                probe.bind(("0.0.0.0", base + offset))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
        return base
    raise AssertionError("no free range of ports")


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips what needs a cluster where none can be."""
    if (obstacle := _obstacle()) is not None:
        pytest.skip(f"no Slurm cluster for tests: {obstacle}")


@pytest.fixture(scope="session")
def cluster(possible: None) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="r1reward-slurm-"))
    folder.chmod(0o755)  # MUNGE's socket must be reachable for all users; pytest's own folders are private
    environment = {**os.environ, "SLURM_TEST_DIR": str(folder / "cluster"), "NODES": str(NODES), "DBD": "1"}
    environment |= {"PYXIS": "1", "PORT_BASE": str(_free_port_base()), "CPUS": "16", "MEM": "32000"}
    environment["GPUS"] = "8"  # per node, so that no job waits for another
    if Path("/sys/fs/cgroup/freezer/slurm_n1").exists():  # another cluster of this kind is running
        environment["PROCTRACK"] = "linuxproc"
    config = folder / "cluster" / "etc" / "slurm.conf"
    # Who ends the tests early (a time limit, say) shall not leave daemons behind.
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))
    try:
        started = subprocess.run(
            ["bash", str(SCRIPT), "start"], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr
        os.environ["SLURM_CONF"] = str(config)
        yield Cluster(script=SCRIPT, environment=environment, config=config)
    finally:
        signal.signal(signal.SIGTERM, previous)
        subprocess.run(["bash", str(SCRIPT), "stop"], env=environment, timeout=120, check=False)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def inputs(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Path]]:
    """Data, a tiny model and run files, made once, and while the cluster starts."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("jobs")
        write_inputs(folder)
        return folder

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="inputs") as pool:
        yield pool.submit(make)


@pytest.fixture(scope="session")
def bench(inputs: Future[Path], cluster: Cluster) -> Bench:
    return Bench(cluster=cluster, folder=inputs.result())


class Times:
    """When scenarios and jobs ran, and what jobs cost: where the time of the tests goes."""

    def __init__(self) -> None:
        self._began = time.time()
        self._rows: list[tuple[float, float, str]] = []

    def of(self, name: str, bench: Bench) -> Any:
        """The result of a scenario."""
        began = time.time()
        try:
            return SCENARIOS[name](bench)
        finally:
            self._rows.append((began, time.time(), name))

    def table(self) -> list[str]:
        columns = "JobID,JobName,Start,End,TotalCPU"
        variables = {"SLURM_TIME_FORMAT": "%s"}
        text = tool("sacct", "-n", "-P", "-D", "-a", "-o", columns, environment=variables)  # of jobs alone (-X) it is 0
        rows = list(self._rows)
        for job, name, start, end, cpu in (line.split("|") for line in text.splitlines()):
            if "." not in job and start.isdigit() and end.isdigit():
                rows.append((float(start), float(end), f"    job {job} {name}, processor time {cpu}"))
        return [f"{a - self._began:5.0f} s to {b - self._began:5.0f} s  {what}" for a, b, what in sorted(rows)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(TIMELINE, None):
        terminalreporter.section("scenarios and jobs")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def running(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """Scenarios by name, under way from the first test on."""
    asked = {marker.args[0] for item in request.session.items if (marker := item.get_closest_marker("scenario"))}
    if not recipe_runs.LAUNCHER.exists():
        asked = {name for name in asked if not name.startswith("nemo")}
    asked |= {needed for name in asked for needed in NEEDS.get(name, ())}
    if not asked:
        yield {}
        return
    bench: Bench = request.getfixturevalue("bench")
    times = Times()
    pool = ThreadPoolExecutor(max_workers=3, thread_name_prefix="scenario")
    futures = {name: pool.submit(times.of, name, bench) for name in SCENARIOS if name in asked}
    yield futures
    pool.shutdown(wait=False, cancel_futures=True)
    while not all(future.done() for future in futures.values()):  # the tests end early
        bench.stopping.set()
        tool("scancel", "--quiet", "--user=root")
        time.sleep(1)
    request.config.stash[TIMELINE] = times.table()


@pytest.fixture
def ended(running: dict[str, Future[Any]], request: pytest.FixtureRequest) -> Any:
    """The result of the test's scenario."""
    marker = request.node.get_closest_marker("scenario")
    return running[marker.args[0]].result()


@pytest.fixture(scope="session")
def left_behind(running: dict[str, Future[Any]], cluster: Cluster) -> str | None:
    """After the last scenario: what is left of all jobs half a minute later; None when nothing."""
    for future in running.values():
        future.exception()
    deadline = time.monotonic() + 30
    while (rest := cluster.left_behind()) is not None and time.monotonic() < deadline:
        time.sleep(0.5)
    return rest
