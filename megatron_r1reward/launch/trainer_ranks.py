"""A trainer stage on every rank: joining the others, and what `r1reward sft` and `r1reward rm` do then.

RL, which has servers besides, is in `stages`: their clients take every rank seconds to import.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.addresses import node_address
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.processes import quick_imports

if TYPE_CHECKING:  # torch and megatron-core take seconds to import: a bad run file is refused before that
    from megatron_r1reward.parallel.setup import Topology

log = logging.getLogger(__name__)


@contextmanager
def ranks(config: RunConfig, rendezvous: Path | None) -> Iterator[Topology]:
    """Join the other ranks, at `rendezvous` where a supervisor started them; leave them at the end."""
    from megatron_r1reward.parallel.setup import Rendezvous

    topology = setup.initialize(
        config.parallel,
        seed=config.run.seed,
        deterministic=config.precision.deterministic,
        timeout=timedelta(seconds=config.cluster.stall_timeout_s),
        rendezvous=Rendezvous(path=rendezvous, host=node_address()) if rendezvous is not None else None,
    )
    try:
        yield topology
    finally:
        setup.shutdown()


def train(config: RunConfig, stage: Literal["sft", "rm"], *, rendezvous: Path | None = None) -> bool:
    """A stage without servers, on every rank. False: it has saved and stopped on request."""
    check_models(config, stage)
    with quick_imports():
        from megatron_r1reward.training import rm, sft

    run, done = {"sft": (sft.run, "SFT finished"), "rm": (rm.run, "the scalar reward model is trained")}[stage]
    with ranks(config, rendezvous) as topology:
        folder = run(config, topology)
    if folder is not None:
        log.info("%s: %s", done, folder)
    return folder is not None
