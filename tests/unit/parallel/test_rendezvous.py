"""Ranks meet through a file, on a port that nobody had to choose."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_r1reward.parallel.setup import Rendezvous

TIMEOUT = timedelta(seconds=120)


def test_ranks_meet_whoever_comes_first(tmp_path: Path) -> None:
    meeting = Rendezvous(path=tmp_path / "live" / "rendezvous.json", host="127.0.0.1")
    heard = []

    def join() -> None:
        heard.append(meeting.store(1, 2, TIMEOUT).get("greeting"))

    late = threading.Thread(target=join)
    late.start()  # waits for rank 0
    store = meeting.store(0, 2, TIMEOUT)
    store.set("greeting", "hello")
    late.join()
    assert heard == [b"hello"]


def test_a_missing_rank_zero_is_said(tmp_path: Path) -> None:
    meeting = Rendezvous(path=tmp_path / "rendezvous.json", host="127.0.0.1")
    with pytest.raises(ValueError, match=r"rank 1: no .*rendezvous\.json.*share"):
        meeting.store(1, 2, timedelta(seconds=0.2))
