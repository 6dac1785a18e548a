"""Verdicts that a judge has given, on disk, by the content of the question."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megatron_r1reward.types import JudgeVerdict

_SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL) WITHOUT ROWID"
_CHUNK = 500  # SQLite's limit on the number of parameters is at least 999


class VerdictCache:
    """Remembers usable verdicts for this run and the next; a damaged or foreign file is refused, not overwritten.

    Args:
        path: SQLite file, created with its folders; None: remember in memory only.

    Raises:
        ValueError: the file is not such a cache.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")  # other runs may read and write the same file
            self._database.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"judge.cache {path} is not a verdict cache ({error}): name another file") from error

    def get(self, keys: Sequence[str]) -> dict[str, JudgeVerdict]:
        """The verdicts that are known among `keys`."""
        found: dict[str, JudgeVerdict] = {}
        with self._lock:
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                rows = self._database.execute(f"SELECT key, verdict FROM verdicts WHERE key IN ({marks})", list(part))
                found |= {key: cast(JudgeVerdict, verdict) for key, verdict in rows}
        return found

    def add(self, verdicts: Mapping[str, JudgeVerdict]) -> None:
        assert not {"unknown", "not_asked"} & set(verdicts.values()), "only verdicts that a judge gave"
        with self._lock, self._database:
            self._database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", list(verdicts.items()))

    def close(self) -> None:
        self._database.close()


def question_key(judge: str, settings: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of everything that decides a verdict: the judge's identity, its sampling settings, the messages."""
    content = json.dumps([judge, settings, messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()
