"""What `r1reward sft` does; apart from the stages with servers, whose clients take every rank seconds to import."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.ranks import ranks
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.training import sft as sft_stage

log = logging.getLogger(__name__)


def sft(config: RunConfig, *, rendezvous: Path | None = None) -> bool:
    """Stage 1, on every rank. False: it has saved and stopped on request."""
    check_models(config, "sft")
    with ranks(config, rendezvous) as topology:
        folder = sft_stage.run(config, topology)
    if folder is not None:
        log.info("SFT finished: %s", folder)
    return folder is not None
