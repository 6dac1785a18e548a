"""A user's mistake is one line with thing, value and fix, and exit code 2, whatever the command."""

from __future__ import annotations

import errno
import json
import logging
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.files import read_json
from megatron_r1reward.user_errors import one_line, user_errors


def r1reward(*arguments: str | Path, folder: Path) -> tuple[int, list[str]]:
    """(exit code, lines of standard error) of the command, as a user starts it."""
    command = [sys.executable, "-m", "megatron_r1reward.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip().splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "afile").write_text("")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "import", "rows.jsonl", "--out", "afile"], ["afile", "name another path"]),
        (["data", "import", "rows.jsonl", "--out", "afile/x"], ["afile", "is a file"]),
        (["tiny", "--out", "t", "--corpus", "missing.jsonl"], ["missing.jsonl", "check the path"]),
        (["plan", "missing.toml"], ["missing.toml"]),
        (["servers", "torn"], ["torn/live/rollout-servers.json is not JSON (", "write or copy it again"]),
        (["report", "no-such-run"], ["no-such-run is not a folder"]),
        (["convert", "inspect", "no-such-folder"], ["no-such-folder"]),
    ],
)
def test_one_line_and_exit_code_2(folder: Path, arguments: list[str], words: list[str]) -> None:
    (folder / "torn" / "live").mkdir(parents=True)
    (folder / "torn" / "live" / "rollout-servers.json").write_text('[{"url": "http')
    code, lines = r1reward(*arguments, folder=folder)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


RUN_FILES = {
    "unknown.toml": '[run]\noutput_dir = "x"\nsede = 1\n[model]\npath = "m"\n[data]\ntrain = "d"\n',
    "torn.toml": '[run]\noutput_dir = "x',
    "odd.toml": '[run]\noutput_dir = "x"\n[model]\npath = "m"\n[data]\ntrain = "d"\n[optimizer]\nlr = -1\n',
    "nowhere.toml": '[run]\noutput_dir = "x"\n[model]\npath = "no-model"\n[data]\ntrain = "no-data.jsonl"\n',
}
NAMES = (*RUN_FILES, "gone.toml")
MISTAKES = [
    *([stage, name] for stage in ("sft", "rm", "rl", "eval", "annotate", "plan") for name in NAMES),
    *(["launch", stage, "torn.toml"] for stage in ("sft", "rm", "rl", "eval", "annotate", "judge", "serve")),
    ["launch", "sft", "nowhere.toml"],
    *(["doctor", "--quick", "--run-file", name] for name in ("unknown.toml", "torn.toml", "gone.toml")),
    *(["serve-labels", name] for name in NAMES),
    *(["data", "sft", name, "--out", "o"] for name in NAMES),
    ["data", "inspect", "rows.jsonl", "--run-file", "torn.toml"],
    *(["data", command, "gone.jsonl", "--out", "o"] for command in ("import", "inspect")),
    ["data", "import", "rows.jsonl", "--out", "o", "--remove-overlap-with", "gone.jsonl"],
    *(["convert", command, "gone"] for command in ("inspect", "verify")),
    *(["convert", command, "gone", "o"] for command in ("import", "export")),
    ["convert", "average", "gone", "gone", "--out", "o"],
    ["convert", "import", ".", "o"],
    ["score", "gone.jsonl", "o.jsonl", "--model", "http://127.0.0.1:9"],
    ["score", "rows.jsonl", "o.jsonl", "--model", "gone"],
    ["bench", "pairs", "gone.jsonl", "--model", "gone", "--out", "o"],
    ["bench", "pairs", "rows.jsonl", "--model", "gone", "--out", "o"],
    ["bench", "pairs", "rows.jsonl", "--model", "http://127.0.0.1:9", "--judge", "gone", "--out", "o"],
    ["calibrate", "gone", "rows.jsonl"],
    ["calibrate", ".", "gone.json"],
    ["serve", "gone"],
    ["serve", "torn.toml"],
    ["hub", "card", "gone"],
    ["report", "gone"],
    ["report", "."],
    ["servers", "gone"],
    ["tiny", "--out", "t", "--corpus", "gone.jsonl"],
    ["demo", "--run-files", "gone"],
]
_ALL_IN_ONE = """
import json, sys
from typer.testing import CliRunner
from megatron_r1reward.cli import app
HEAVY = {"torch", "vllm", "transformers", "megatron", "datasets", "pyarrow", "scipy", "sklearn", "matplotlib", "openai",
         "fastapi", "safetensors"}
for line in sys.stdin:
    result = CliRunner().invoke(app, json.loads(line))
    print(json.dumps([result.exit_code, result.stderr.splitlines(), sorted(HEAVY & set(sys.modules))]))
"""


@pytest.mark.slow
def test_a_mistake_is_answered_before_anything_heavy_is_imported(folder: Path) -> None:
    """`plan` took five seconds of processor time to say that a key is unknown. All in one process: what none of them
    imports, no one does."""
    for name, text in RUN_FILES.items():
        (folder / name).write_text(text)
    given = "".join(json.dumps(words) + "\n" for words in MISTAKES)
    done = subprocess.run(
        [sys.executable, "-c", _ALL_IN_ONE], input=given, cwd=folder, capture_output=True, text=True, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(MISTAKES), done.stderr
    for words, (code, lines, heavy) in zip(MISTAKES, answers, strict=True):
        assert code == 2, (words, lines)
        errors = [line for line in lines if not line.startswith("  ")]  # one line per key of a run file
        assert len(errors) == 1 and errors[0].startswith("error: "), (words, lines)
        assert not heavy, f"{words} imports {heavy}"


def fails(error: BaseException, **options: bool) -> int | str | None:
    with pytest.raises(SystemExit) as end, user_errors(**options):
        raise error
    return end.value.code


def test_what_the_system_refuses_names_the_file_and_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(OSError(errno.ENOSPC, "No space left on device", "/scratch/run/x")) == 2
    assert capsys.readouterr().err == (
        "error: /scratch/run/x: No space left on device; free some space, or write elsewhere\n"
    )
    assert one_line(PermissionError(errno.EACCES, "Permission denied", b"/a", None, "/b")).startswith("/a -> /b: Perm")
    assert one_line(OSError("odd")) == "odd"
    assert one_line(ValueError()) == "ValueError"


def test_nothing_in_a_message_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(ValueError("[rollout] gpus = 3 [/bold] in /runs/[old]/x")) == 2
    assert capsys.readouterr().err == "error: [rollout] gpus = 3 [/bold] in /runs/[old]/x\n"


def test_this_packages_own_runtime_errors_are_a_line_and_those_of_libraries_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_r1reward.network.guard import BearerGuard

    with pytest.raises(SystemExit) as end, user_errors():
        BearerGuard(None, token="")  # type: ignore[arg-type]
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: no bearer token: set R1REWARD_SERVER_TOKEN")
    with pytest.raises(RuntimeError, match="of a library"), user_errors():
        raise RuntimeError("of a library")  # this file is no part of the package
    with pytest.raises(AssertionError), user_errors():
        raise AssertionError


def test_an_exit_code_passes() -> None:
    """A typer.Exit is a RuntimeError."""
    with pytest.raises(typer.Exit) as end, user_errors():
        raise typer.Exit(75)
    assert end.value.exit_code == 75
    done = CliRunner().invoke(app, ["status", "."])  # not a run: 1, and not the user's mistake
    assert "error: 1" not in done.output


def test_the_log_of_a_rank_or_server_keeps_the_traceback() -> None:
    with pytest.raises(OSError, match="reset"), user_errors(component=True):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert fails(ValueError("rl.steps = 0: at least 1"), component=True) == 2


def test_torn_json_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}
    for content in (b'{"a": ', b"", b"\xff\xfe{", b"git-lfs"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"state\.json is not JSON"):
            read_json(path)


def test_a_plan_prints_brackets_of_the_run_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`[rollout]` was swallowed as a style, and a closing tag crashed."""
    from megatron_r1reward.planner import show_plan

    def refuse(*_: object) -> None:
        raise ValueError("[rollout] servers = 3: /runs/[/old] is too small")

    monkeypatch.setattr(show_plan, "make_plan", refuse)
    monkeypatch.setattr(show_plan, "nearest_fit", lambda *_: None)
    assert not show_plan.run_plan(None, stage="sft")  # type: ignore[arg-type]
    assert "does not fit: [rollout] servers = 3: /runs/[/old] is too small" in capsys.readouterr().out


def test_ranks_other_than_the_first_speak_up_only_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: levels.append(settings["level"]))
    for rank, level in (("0", logging.INFO), ("1", logging.INFO), ("1", logging.ERROR)):
        monkeypatch.setenv("RANK", rank)
        with user_errors(level=level):
            pass
    assert levels == [logging.INFO, logging.WARNING, logging.ERROR]


def out_of_gpu_memory() -> None:
    import torch

    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.10 GiB is "
        "free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by PyTorch"
    )


def out_of_memory() -> None:
    import torch

    torch.empty(1 << 50, dtype=torch.float64)


def out_of_python_memory() -> None:
    bytearray(1 << 60)


def port_in_use() -> None:
    import torch.distributed as dist

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        dist.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True, wait_for_workers=False)


def full_disk() -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_of_sqlite() -> None:
    raise sqlite3.OperationalError("database or disk is full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "thing", "fix"),
    [
        (out_of_gpu_memory, "Tried to allocate 20.00 GiB. GPU 0 has a total", "lower data.token_budget"),
        (out_of_memory, "allocate 9007199254740992 bytes", "`r1reward plan RUN.toml` says what fits"),
        (out_of_python_memory, "MemoryError", "lower data.token_budget"),
        (port_in_use, "port: ", "another process has the port: end it"),
        (full_disk, "No space left on device (os error 28)", "free some space"),
        (full_disk_of_sqlite, "disk is full", "free some space"),
    ],
)
def test_a_full_machine_in_the_words_of_libraries_is_a_line(
    fault: Callable[[], None], thing: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were tracebacks; the log of a rank keeps its traceback, and ends with the line."""
    for component in (False, True):
        with pytest.raises(SystemExit) as end, user_errors(component=component):
            fault()
        assert end.value.code == 2
        *before, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert thing in line and fix in line
        assert bool([text for text in before if text.startswith("Traceback")]) == component, before
        assert len(line) < 400
