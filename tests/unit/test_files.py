"""Files appear whole, under the user's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from megatron_r1reward.files import write_text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_reads_a_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
