"""The nodes that a stage may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Node:
    """What this job may use of one machine."""

    name: str
    gpus: int
    cpus: int


@dataclass(frozen=True, kw_only=True)
class Site:
    """The nodes of this job, by group: one group, except in a heterogeneous job."""

    groups: tuple[tuple[Node, ...], ...]

    def group(self, index: int, what: str) -> tuple[Node, ...]:
        """ValueError when the job has no such group."""
        if index >= len(self.groups):
            raise ValueError(
                f"cluster.{what}_het_group is {index}, but this job has {len(self.groups)} group(s): submit a "
                "heterogeneous job (docs/cluster.md) or set it to 0"
            )
        return self.groups[index]
