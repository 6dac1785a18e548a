"""Folders that a stage and its servers must agree on."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig


def media_root(config: RunConfig) -> Path:
    """The deepest folder that holds every image a request may name."""
    roots = [config.data.image_root or config.data.train.parent, config.run.output_dir]
    if config.evaluation.data is not None:
        roots.append(config.evaluation.image_root or config.evaluation.data.parent)
    return Path(os.path.commonpath([root.resolve() for root in roots]))
