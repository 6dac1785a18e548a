"""The model chunks of one rank as one module: one chunk per stage, or several under the interleaved schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ModelChunks(torch.nn.ModuleList):
    """Several chunks of one rank. Saved and loaded together; megatron-core's schedules take them as a list."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Local names carry the chunk's number; the names in the checkpoint do not, so layouts are interchangeable."""
        return {
            f"{prefix}{number}.{name}": item
            for number, chunk in enumerate(self)
            for name, item in chunk.sharded_state_dict("", sharded_offsets, metadata).items()  # type: ignore[operator]
        }


def join_chunks(chunks: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """The one chunk itself, or all of them as one module."""
    return chunks[0] if len(chunks) == 1 else ModelChunks(chunks)


def chunks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The chunks of a model, in the order of the interleaved schedule."""
    return list(model) if isinstance(model, ModelChunks) else [model]
