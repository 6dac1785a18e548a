"""Files appear whole, under the user's umask."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from megatron_r1reward.files import recover_jsonl, write_text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_reads_a_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'{"a": 1}\n{"a": "\xc3\xbc"}\n', [1, "ü"]),
        (b'{"a": 1}\n{"a": 2}', [1, 2]),  # killed before the line's end: nothing is lost
        (b'{"a": 1}\n{"a": "\xc3', [1]),
        (b'{"a"', []),
        (b'{"a": 1}\n\x00\x00{"a": 2}\n{"a": 3}\n', [1, 3]),  # a power failure
        (b"", []),
    ],
)
def test_a_torn_record_is_whole_when_it_has_been_read(tmp_path: Path, content: bytes, rows: list) -> None:
    path = tmp_path / "record.jsonl"
    assert recover_jsonl(path) == []
    path.write_bytes(content)
    assert [row["a"] for row in recover_jsonl(path)] == rows
    with path.open("a") as sink:
        sink.write('{"a": "next"}\n')
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [*rows, "next"]
