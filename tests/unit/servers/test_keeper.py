"""A server never outlives its starter. Here other programs are in vLLM's place; with vLLM: e2e/test_server_start.py."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from orphans import MARK, Starter
from waiting import wait_until

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.servers.keeper import remove_of_killed, remove_unmapped
from megatron_r1reward.servers.process import VllmServer

# Starts like vLLM at its worst: SIGTERM ends it at first, then it is swallowed; workers that leave the process group,
# and shared memory that nobody unlinks.
PROGRAM = f"""
from megatron_r1reward.servers.keeper import keep
keep()
import os, random, signal, time
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
def pause():
    time.sleep(random.uniform(0, 0.4))
pause()
signal.signal(signal.SIGTERM, lambda *_: None)
blocks = []
for number in range(3):
    pause()
    blocks.append(shared_memory.SharedMemory(name=f"{{os.environ['{MARK}']}}-{{number}}", create=True, size=4096))
    if os.fork() == 0:
        os.setsid()
        blocks += [shared_memory.SharedMemory(name=f"{{os.environ['{MARK}']}}-w{{number}}", create=True, size=4096)]
        while True:
            time.sleep(60)
print("started", flush=True)
while True:
    time.sleep(60)
"""


def server(folder: Path, program: str = PROGRAM) -> VllmServer:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    made = VllmServer(ServerSection(), model_path=folder, log_path=folder / "server.log", on_cpu=True)
    made._command = [sys.executable, "-c", program]
    return made


def starter(folder: Path, *, lives: int = 1) -> Starter:
    def start() -> None:
        made = server(folder)
        made._environment[MARK] = os.environ[MARK]
        for _ in range(lives):
            made.start()

    return Starter(start)


@pytest.mark.slow
def test_a_starter_killed_at_any_moment_of_the_start_leaves_nothing(tmp_path: Path) -> None:
    """Sixteen starts side by side; the moments are spread over the second and a half that one takes, and beyond."""
    draw = random.Random(7)
    starters = [starter(tmp_path / str(number)) for number in range(16)]
    began = time.monotonic()
    for moment, one in sorted((draw.uniform(0, 2.5), number) for number in range(16)):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        starters[one].kill()
    for one in starters:
        one.assert_nothing_is_left()


def test_a_server_that_was_suspended_goes_on(tmp_path: Path) -> None:
    """As with `scontrol suspend`: everything stands still for longer than the keeper waits for signals."""
    program = "from megatron_r1reward.servers.keeper import keep; keep(); import time; print('started', flush=True)"
    made = server(tmp_path / "a", program + "; time.sleep(600)")
    made.start()
    try:
        wait_until(lambda: "started" in (tmp_path / "a" / "server.log").read_text())
        assert made.pid is not None
        os.kill(made.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(made.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert made.alive
    finally:
        made.close()


def test_a_server_that_dies_takes_its_workers_along(tmp_path: Path) -> None:
    one = starter(tmp_path / "a")
    try:
        wait_until(lambda: "started" in (tmp_path / "a" / "server.log").read_text() if one.servers() else False)
        keeper = next(pid for pid in one.servers() if psutil.Process(pid).ppid() == one.pid)
        one.look()
        assert len(one.traces) >= 6
        os.kill(psutil.Process(keeper).children()[0].pid, signal.SIGKILL)
        wait_until(lambda: psutil.Process(keeper).status() == psutil.STATUS_ZOMBIE)
        one.assert_nothing_is_left()
    finally:
        one.kill()


@pytest.mark.slow
def test_told_to_end_it_ends_what_swallows_the_signal(tmp_path: Path) -> None:
    os.environ[MARK] = mark = f"mark-{os.getpid()}"
    try:
        made = server(tmp_path)
    finally:
        del os.environ[MARK]
    made.start()
    process = made._process
    assert process is not None
    wait_until(lambda: "started" in (tmp_path / "server.log").read_text())
    assert len(list(Path("/dev/shm").glob(f"{mark}*"))) >= 3
    process.terminate()
    process.wait(120)
    assert made.returncode == 128 + signal.SIGKILL
    assert not list(Path("/dev/shm").glob(f"{mark}*"))
    made.close()


def test_the_exit_code_is_the_programs(tmp_path: Path) -> None:
    keep = "from megatron_r1reward.servers.keeper import keep; keep(); import os, sys, signal; "
    for program, code in (("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV)):
        made = server(tmp_path, keep + program)
        made.start()
        wait_until(lambda: not made.alive)  # noqa: B023
        assert made.returncode == code
        made.close()


def test_shared_memory_of_a_killed_group_goes_when_its_last_process_does(tmp_path: Path) -> None:
    """Who was sent SIGKILL may still be there when the leader of its group is gone."""
    memory = Path("/dev/shm") / f"r1reward-test-{uuid.uuid4().hex}"
    memory.write_bytes(b"x" * 4096)
    program = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, memory],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    ) as member:  # fmt: skip
        assert member.stdout is not None
        member.stdout.readline()
        remove_unmapped([memory])
        assert memory.exists(), "it is in use"
        removing = threading.Thread(target=remove_of_killed, args=(member.pid, [memory]))
        removing.start()
        os.killpg(member.pid, signal.SIGKILL)
    removing.join()
    assert not memory.exists()
