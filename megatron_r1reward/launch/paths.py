"""Folders that a stage and its servers must agree on."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.stage_data import image_folders


def media_root(config: RunConfig) -> Path:
    """The deepest folder that holds every image a request may name."""
    return Path(os.path.commonpath([folder.resolve() for folder in image_folders(config)]))
