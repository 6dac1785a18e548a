"""`bench`, `annotate` and `data import` killed by SIGKILL at several moments: they go on, and nothing is done twice."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scripted_server import ScriptedServer, completion
from waiting import wait_until

pytestmark = pytest.mark.slow

# Has imported what the commands need, and forks a child for each that it is told: a process of its own takes seconds.
PROGRAM = """
import json, os, sys, traceback
from megatron_r1reward.cli import app
import megatron_r1reward.evaluation.annotate, megatron_r1reward.evaluation.bench, megatron_r1reward.launch.stages
import megatron_r1reward.data.importing, megatron_r1reward.report.bench_report, megatron_r1reward.report.balance_chart

print("ready", flush=True)
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        code = 70
        try:
            app(json.loads(line))
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "commands.log"
        self._program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._program.stdout is not None
        return self._program.stdout.readline().strip()

    def start(self, *command: object) -> int:
        """Returns the process's id."""
        assert self._program.stdin is not None
        self._program.stdin.write(json.dumps([str(word) for word in command]) + "\n")
        self._program.stdin.flush()
        return int(self._said())

    def kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):  # it may have ended meanwhile
            os.kill(pid, signal.SIGKILL)
        assert int(self._said()) in (-signal.SIGKILL, 0)

    def finish(self, *command: object) -> None:
        self.start(*command)
        code = self._said()
        assert code == "0", self.log.read_text()

    def close(self) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    running = Commands(tmp_path_factory.mktemp("commands"))
    yield running
    running.close()


class Gate(ScriptedServer):
    """Answers as many requests as it may, and lets the others wait; those of a client that was killed get nothing."""

    def __init__(self) -> None:
        self._may, self._dead, self._changed = 0, False, threading.Condition()
        super().__init__([""])

    def let(self, number: int) -> None:
        with self._changed:
            self._may += number
            self._changed.notify_all()

    def client_died(self) -> None:
        """Until nothing of it is left: what it sent, and nobody has read yet, must not be taken for the next one's."""
        self._refuse()
        wait_until(lambda: not self._connected())
        with self._changed:
            self._dead = False

    def _refuse(self) -> None:
        with self._changed:
            self._may, self._dead = 0, True
            self._changed.notify_all()

    def _connected(self) -> bool:
        """Also what waits to be accepted."""
        open_ones = (psutil.CONN_SYN_RECV, psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
        port = self._http.server_address[1]
        found = psutil.net_connections(kind="tcp4")
        return any(one.laddr and one.laddr.port == port and one.status in open_ones for one in found)

    def stop(self) -> None:
        self._refuse()
        super().stop()

    def _reply(self, body: dict) -> tuple[int, str, str]:
        with self._changed:
            self._changed.wait_for(lambda: self._dead or self._may > 0)
            if self._dead:
                return 503, "application/json", "{}"
            self._may -= 1
            self.requests.append(body)
        said = completion("<think>The second.</think><answer>2</answer>")
        return 200, "application/json", said


@pytest.fixture
def gate() -> Iterator[Gate]:
    server = Gate()
    yield server
    server.stop()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve pairs; those with an odd number are labelled 2, which the server says."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    lines = [
        {"id": f"r{number}", "question": f"Which of {number}?", "response_1": "a", "response_2": "b",
         "answer": 1 + number % 2, "image": "a.png"}
        for number in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(path: Path) -> list[dict]:
    """The whole lines of a record that may be written at this moment."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def go_on_killed(commands: Commands, gate: Gate, record: Path, moments: list[int], command: list[object]) -> None:
    """Kill the command when it has written so many further answers each time, then let it finish."""
    answered = 0
    for more in moments:
        pid = commands.start(*command)
        gate.let(more)
        answered += more
        wait_until(lambda: len(lines_of(record)) == answered)  # noqa: B023
        commands.kill(pid)
        gate.client_died()
        assert len(gate.requests) == answered
    gate.let(10_000)
    commands.finish(*command)


def test_a_killed_bench_asks_nothing_twice(commands: Commands, gate: Gate, rows: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[object]:
        return ["bench", rows, "--model", gate.url, "--out", tmp_path / out]

    record = tmp_path / "out" / "judgements.jsonl"
    go_on_killed(commands, gate, record, [0, 1, 7, 16], command("out"))  # at the start, and when all is said
    assert len(gate.requests) == 12 * 2
    lines = lines_of(record)
    assert len({line["key"] for line in lines}) == len(lines) == 12 * 2
    commands.finish(*command("whole"))
    assert (tmp_path / "out" / "bench.json").read_text() == (tmp_path / "whole" / "bench.json").read_text()


def test_a_killed_annotation_asks_nothing_twice(commands: Commands, gate: Gate, rows: Path, tmp_path: Path) -> None:
    """Six pairs need one attempt, the others get three."""

    def command(out: str) -> list[object]:
        file = tmp_path / f"{out}.toml"
        file.write_text(
            f'[run]\noutput_dir = "{tmp_path / out}"\n[model]\npath = "{tmp_path}"\n[data]\ntrain = "{rows}"\n'
            f'[annotate]\nurl = "{gate.url}/v1"\nmodel = "strong"\nattempts = 3\nconcurrency = 5\n'
        )
        return ["annotate", file]

    record = tmp_path / "out" / "attempts.jsonl"
    go_on_killed(commands, gate, record, [0, 2, 9, 13], command("out"))
    asked = Counter((json.dumps(request["messages"]), request["seed"]) for request in gate.requests)
    assert set(asked.values()) == {1}
    assert len(asked) == 6 + 6 * 3 == len(lines_of(record))
    commands.finish(*command("whole"))
    for name in ("hard.json", "difficulty.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    last, whole = (
        {line["preference_id"]: line for line in lines_of(tmp_path / out / "attempts.jsonl")}
        for out in ("out", "whole")
    )
    assert last == whole


def test_a_killed_import_leaves_no_process_and_reads_no_part_twice(commands: Commands, tmp_path: Path) -> None:
    noise, rows = np.random.default_rng(0), []
    for number in range(1200):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"id": str(number), "prompt": f"Which {number}?", "chosen": "a", "rejected": "b",
                     "image": {"bytes": buffer.getvalue(), "path": None}})  # fmt: skip
    source, parts = tmp_path / "rows.parquet", tmp_path / "out" / ".parts"
    pq.write_table(pa.Table.from_pylist(rows), source)

    def command(out: str, processes: int) -> list[object]:
        return ["data", "import", source, "--out", tmp_path / out, "--processes", processes]

    def there() -> dict[str, int] | None:
        """The finished parts; None: the import has ended."""
        if (tmp_path / "out" / "import.json").exists():
            return None
        return {path.name: path.stat().st_ino for path in parts.glob("[0-9]*")}

    def is_at(wanted: int) -> bool:
        found = there()
        return found is None or (parts.is_dir() and len(found) >= wanted)

    known: dict[str, int] = {}
    for wanted, processes in ((0, 1), (1, 1), (2, 2), (5, 1)):
        pid = commands.start(*command("out", processes))
        wait_until(lambda: is_at(wanted))  # noqa: B023
        children = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(pid).children(recursive=True)
        commands.kill(pid)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        found = there()
        assert found is None or known.items() <= found.items(), "a part that is there is not written again"
        known = found or {}
    commands.finish(*command("out", 1))
    commands.finish(*command("whole", 1))
    files = {
        out: {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*.*")}
        for out in ("out", "whole")
    }
    assert files["out"].keys() == files["whole"].keys(), "no temporary file is left"
    for name, content in files["out"].items():
        assert content.replace(bytes(tmp_path / "out"), b"") == files["whole"][name].replace(
            bytes(tmp_path / "whole"), b""
        )
