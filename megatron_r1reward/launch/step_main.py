"""What a job step runs: one trainer rank, another driver, or one server. Started by the supervisor, never by hand."""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path

from megatron_r1reward.cluster.placement import ServerKind, Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.processes import quick_imports
from megatron_r1reward.run_dir import RunDir


def allow_stack_dumps() -> None:
    """SIGUSR2 writes the stacks of all threads to standard error: what a hanging process is doing."""
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)


def run_driver(config: RunConfig, stage: Stage) -> None:
    """The stage itself, beside servers that are there already. A trainer that stops on request leaves with 0 as well:
    any other exit code would end its peers in the middle of their own leaving."""
    rendezvous = rendezvous_path(config)
    if stage in ("sft", "rm"):
        with quick_imports():
            from megatron_r1reward.launch.trainer_ranks import train

        train(config, stage, rendezvous=rendezvous)
        return
    with quick_imports():
        from megatron_r1reward.launch import serve_model, stages
        from megatron_r1reward.launch.addresses import connected

    match stage:
        case "rl":
            stages.rl(config, rendezvous=rendezvous, supervised=True)
        case "eval":
            stages.evaluate(connected(config, stage), supervised=True)
        case "annotate":
            stages.annotate(connected(config, stage), supervised=True)
        case "serve":
            serve_model.serve_stage(config)
        case "judge":
            raise AssertionError("a judge has no driver")


def run_server(config: RunConfig, stage: Stage, kind: ServerKind, index: int, *, life: int, start: int) -> int:
    """Its exit code."""
    from megatron_r1reward.launch.server_main import serve

    return serve(config, stage, kind, index, life=life, start=start)


def rendezvous_path(config: RunConfig) -> Path:
    """`live/` is emptied at the start of a life, so the file is of this one."""
    return RunDir(root=config.run.output_dir).live / "rendezvous.json"
