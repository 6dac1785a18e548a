"""After all jobs: nothing of them is left on the cluster or on this machine."""

from __future__ import annotations

import pytest
from scenarios import Bench

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]


@pytest.mark.scenario("reference")
def test_no_process_no_port_and_no_job_is_left(left_behind: str | None) -> None:
    assert left_behind is None


@pytest.mark.scenario("reference")
def test_no_lock_is_left(left_behind: str | None, bench: Bench) -> None:
    """A run directory may be used again at once."""
    names = (path.relative_to(bench.folder) for path in bench.folder.rglob("*"))
    assert [str(name) for name in names if name.name == "lock" or name.suffix in (".lock", ".tmp", ".pid")] == []
