"""The process group around a trainer stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.addresses import node_address
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.rendezvous import Rendezvous
from megatron_r1reward.parallel.setup import Topology


@contextmanager
def ranks(config: RunConfig, rendezvous: Path | None) -> Iterator[Topology]:
    """Join the other ranks, at `rendezvous` where a supervisor started them; leave them at the end."""
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
