"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact. `check` is `<group>.<thing>`; warnings and errors come with their fix; `node` is set inside a job."""

    check: str
    level: Level
    message: str
    fix: str | None = None
    node: str | None = None

    def __post_init__(self) -> None:
        assert self.level in ("ok", "note") or self.fix, f"{self.check}: a {self.level} needs a fix"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(row: dict[str, Any]) -> Finding:
        return Finding(**row)


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, level="ok", message=message)


def note(check: str, message: str, fix: str | None = None) -> Finding:
    """Worth knowing, nothing to do."""
    return Finding(check=check, level="note", message=message, fix=fix)


def warning(check: str, message: str, fix: str) -> Finding:
    """Works, but slower, less safely, or not in every layout."""
    return Finding(check=check, level="warning", message=message, fix=fix)


def error(check: str, message: str, fix: str) -> Finding:
    """A stage would fail."""
    return Finding(check=check, level="error", message=message, fix=fix)


def worst(findings: Iterable[Finding]) -> Level:
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def merge_nodes(findings: Iterable[Finding], nodes: int) -> list[Finding]:
    """Say once what several nodes say alike; `node` becomes the list of those that do, or None where all do."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for finding in findings:
        key = (finding.check, finding.level, finding.message, finding.fix)
        groups.setdefault(key, []).append(finding.node or "?")
    merged = []
    for (check, level, message, fix), names in groups.items():
        one = Finding(check=str(check), level=level, message=str(message), fix=fix)  # type: ignore[arg-type]
        merged.append(replace(one, node=None if len(names) == nodes and nodes > 1 else ",".join(sorted(names))))
    return merged
