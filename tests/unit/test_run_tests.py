"""The runner of the test suites: what it starts, what it says at the end, and what it finds left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import leftovers
import pytest
import run
from waiting import wait_until

GOOD = "import pytest\ndef test_good(): pass\n@pytest.mark.skip(reason='no GPU')\ndef test_left_out(): pass\n"
BAD = "def test_bad(): assert 1 == 2\n"


def end_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], left: list[str], **files: str) -> tuple[int, list[str]]:
    suites = []
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
        arguments = (str(tmp_path / f"test_{name}.py"), "-p", "no:cacheprovider", f"--rootdir={tmp_path}")
        suites.append(run.Suite(name=name, arguments=arguments, memory_gib=1))
    outcomes = run.run_all(tuple(suites), 2, tmp_path, uuid.uuid4().hex, [])
    run.show_reports(outcomes)
    code = run.show_end(outcomes, 1.0, run.Machine(), left)
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_one_failure_among_the_suites_is_the_end_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = end_of(tmp_path, capsys, [], good=GOOD, bad=BAD, broken="import no_such_module\n")
    assert code == 1
    assert any("assert 1 == 2" in line for line in lines)  # pytest's own report
    assert "FAILED test_bad::test_bad" in lines
    assert any(line.startswith("FAILED suite broken: pytest ended with exit code 2") for line in lines)
    assert lines[-1] == "1 passed, 3 failed, 1 skipped"  # a suite that cannot be collected fails, too


@pytest.mark.slow
def test_all_passed_and_nothing_left_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = end_of(tmp_path, capsys, [], good=GOOD)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")
    assert "left behind: no process, no shared memory, no port" in lines
    assert any("slowest 25" in line for line in lines)
    assert any(line.startswith("memory: at most ") and " cores worked " in line for line in lines)


@pytest.mark.slow
def test_what_is_left_behind_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = end_of(tmp_path, capsys, ["process 7: sleep"], good=GOOD)
    assert code == 1
    assert "FAILED left behind: process 7: sleep" in lines
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"


def test_a_process_with_a_port_and_shared_memory_that_nobody_uses_are_found() -> None:
    """The process is an orphan in a session of its own, as a daemon is."""
    mark, before = uuid.uuid4().hex, leftovers.shared_memory()
    assert leftovers.left_behind(mark, before, patience_s=0) == []
    server = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); time.sleep(600)"
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {server!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", starter], env={**os.environ, leftovers.MARK: mark}, check=True)
    leaked = leftovers.SHARED_MEMORY / f"r1reward-test-{mark}"
    leaked.write_bytes(b"x")
    try:
        wait_until(lambda: any("listens on" in line for line in leftovers.left_behind(mark, before, patience_s=0)))
        lines = leftovers.left_behind(mark, before, patience_s=0)
        assert any(line.startswith("process ") and "socket.create_server" in line for line in lines)
        assert f"shared memory {leaked}" in lines
        with leaked.open():  # in use: another run's
            assert f"shared memory {leaked}" not in leftovers.left_behind(mark, before, patience_s=0)
    finally:
        for process in leftovers.marked_processes(mark):
            process.kill()
        leaked.unlink()
    assert not any(line.startswith("process ") for line in leftovers.left_behind(mark, before))


def test_suites_keep_bytecode_and_run_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    got = run.environment("a mark")
    assert "PYTHONDONTWRITEBYTECODE" not in got
    assert (got["OMP_NUM_THREADS"], got[leftovers.MARK], got["PYTHONPATH"]) == ("1", "a mark", str(run.ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert run.environment("a mark")["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("free_gib", "at_once", "says"),
    [
        (22.0, 4, "up to 19 GiB needed for 4 suites"),
        (17.0, 3, "19 GiB would allow 4 at a time"),
        (8.0, 1, "up to 7 GiB needed for 1 suites"),
        (6.0, 1, "too little"),
    ],
)
def test_less_memory_means_fewer_suites_at_a_time(free_gib: float, at_once: int, says: str) -> None:
    """7 and three times 4 GiB are the largest."""
    number, text = run.plan_memory(run.ALL, free_gib * run.GIB, 4)
    assert number == at_once
    assert says in text


def test_every_test_belongs_to_a_suite() -> None:
    given = {argument for suite in run.ALL for argument in suite.arguments}
    folders = {f"tests/{path.parent.relative_to(run.ROOT / 'tests').parts[0]}" for path in find_tests()}
    assert folders <= given
    left_out = {argument.removeprefix("--ignore=") for argument in given if argument.startswith("--ignore=")}
    assert left_out <= given
    assert all((run.ROOT / path).exists() for path in left_out)


def find_tests() -> list[Path]:
    return [path for path in (run.ROOT / "tests").rglob("test_*.py") if path.parent.name != "tests"]


@pytest.mark.slow
def test_the_tests_of_a_light_room_import_nothing_heavy() -> None:
    program = (
        "import sys, pytest; code = pytest.main(['--collect-only', '-q', 'tests/unit/network', 'tests/unit/cluster']); "
        "heavy = {'torch', 'transformers', 'megatron.core', 'vllm'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=run.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_time_says_how_fast_the_cores_were() -> None:
    """Half of the time a neighbour has half of a core."""
    assert run.speed([0.03, 0.06] * 50, 100.0).endswith("75% of the speed that they had at best, at which it were 75 s")
    assert run.speed([0.05], 10.0).endswith("100% of the speed that they had at best, at which it were 10 s")
