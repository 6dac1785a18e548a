"""`r1reward plan`: print the plan of a run file as tables or JSON, and say whether it fits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.files import write_text
from megatron_r1reward.planner.memory import GIB
from megatron_r1reward.planner.plan import Plan, make_plan, stage_of
from megatron_r1reward.planner.planned_layout import Stage
from megatron_r1reward.planner.suggest import as_overrides, nearest_fit


def run_plan(config: RunConfig, *, stage: Stage | None = None, json_path: Path | None = None) -> bool:
    """Print the plan and the verdict; True when the run fits. `json_path` "-" prints JSON only."""
    stage = stage or stage_of(config)
    only_json = json_path == Path("-")
    console = Console(quiet=only_json, soft_wrap=True)
    plan: Plan | None = None
    problems: tuple[str, ...]
    try:
        plan = make_plan(config, stage)
        problems = plan.problems
        show(plan, console)
    except ValueError as error:
        problems = (str(error),)
    tree: dict[str, Any] = {"fits": not problems, "problems": problems, "plan": plan and to_json(plan)}
    for problem in problems:
        console.print(f"[bold red]does not fit:[/] {escape(problem)}", highlight=False)
    if problems:
        found = nearest_fit(config, stage)
        tree["nearest_fit"] = found and found[0]
        console.print(
            f"nearest change that fits: {as_overrides(found[0])} ({found[1].peak.total / GIB:.1f} GiB per rank)"
            if found
            else "no change of layout, recomputation or number of nodes was found that fits",
            highlight=False,
            markup=False,
        )
    elif plan is not None:
        share = plan.peak.total / plan.device.memory_bytes
        console.print(
            f"[bold green]fits:[/] {plan.peak.total / GIB:.1f} of {plan.device.memory_bytes / GIB:.1f} GiB "
            f"({100 * share:.0f} %) per trainer rank; {plan.time.seconds:.0f} s per step predicted, not measured",
            highlight=False,
        )
    text = json.dumps(tree, indent=2, default=str) + "\n"
    if only_json:
        print(text, end="")
    elif json_path is not None:
        write_text(json_path, text)
    return not problems


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and counts; sets become sorted lists."""
    tree: dict[str, Any] = _plain(asdict(plan))
    tree["fits"] = plan.fits
    tree["peak_bytes"] = plan.peak.total
    tree["total_parameters"] = sum(plan.parameters.values())
    tree["step_seconds"] = plan.time.seconds
    tree["mfu"] = plan.time.update.mfu
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _layout(plan: Plan) -> str:
    layout = plan.layout
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.vpp, "CP": layout.cp, "EP": layout.ep, "DP": layout.dp}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    if layout.sequence_parallel:
        parts.append("sequence parallel")
    if layout.recompute != "none":
        parts.append(f"recompute {layout.recompute}")
    return ", ".join(parts)


def tables(plan: Plan) -> list[Table]:
    """Run, parameters, trainer memory, servers, communication, time."""
    found = [_run(plan), _parameters(plan), _memory(plan)]
    if plan.servers:
        found.append(_servers(plan))
    return [*found, _communication(plan), _time(plan)]


def _run(plan: Plan) -> Table:
    devices, work = plan.devices, plan.workload
    placed = f"trainer {devices.trainer}"
    if plan.stage == "rl":
        placed += f", rollout {devices.rollout}{' on the same' if devices.colocated else ''}, judge {devices.judge}"
    idle = devices.total - devices.trainer - devices.judge - (0 if devices.colocated else devices.rollout)
    rows = [
        ("model", f"{plan.model.name}, {sum(plan.parameters.values()):,} parameters"),
        ("devices", f"{devices.total} x {plan.device.name}: {placed}" + (f", idle {idle}" if idle else "")),
        ("layout", _layout(plan)),
        ("sequence", f"{work.prompt_tokens} + {work.response_tokens} tokens on average, at most {work.longest}"),
        (
            "batch",
            f"{work.sequences} sequences per optimizer step, {work.optimizer_steps} optimizer step(s) per step, "
            f"{work.micro_batches} micro-batch(es) per rank",
        ),
    ]
    return _table(f"{plan.stage} of {plan.model.name}", ("", "value"), rows)


def _parameters(plan: Plan) -> Table:
    rows = [(name, f"{count:,}") for name, count in plan.parameters.items()]
    return _table("parameters", ("component", "count"), [*rows, ("all", f"{sum(plan.parameters.values()):,}")])


def _memory(plan: Plan) -> Table:
    stages = range(len(plan.memory))
    names = list(plan.memory[0].parts())
    rows = [[name.replace("_", " "), *(_gib(plan.memory[s].parts()[name]) for s in stages)] for name in names]
    rows.append(["all", *(_gib(stage.total) for stage in plan.memory)])
    rows.append(["device", *(_gib(plan.device.memory_bytes) for _ in stages)])
    columns = ["part", *(f"stage {s}" if len(stages) > 1 else "GiB" for s in stages)]
    return _table("memory of a trainer rank at its peak, GiB", columns, rows)


def _servers(plan: Plan) -> Table:
    rows = [
        (
            f"{server.count} x {server.kind}, {server.model.name}",
            *(_gib(size) for size in server.memory.parts().values()),
            f"{server.memory.cache_tokens:,}",
        )
        for server in plan.servers
    ]
    return _table(
        "memory of a server's device, GiB", ("server", "weights", "working", "KV cache", "tokens cached"), rows
    )


def _communication(plan: Plan) -> Table:
    worst = max(plan.communication, key=lambda c: c.per_micro_batch)
    counts = plan.workload.micro_batches
    rows = [
        (name.replace("_", " "), f"{size * (1 if name == 'data_parallel' else counts) / 1e9:.2f}")
        for name, size in asdict(worst).items()
        if size
    ]
    if plan.push_bytes:
        rows.append(("weight push (once per step)", f"{plan.push_bytes / 1e9:.2f}"))
    return _table("sent by one rank per optimizer step, GB", ("kind", "GB"), rows)


def _time(plan: Plan) -> Table:
    update = plan.time.update
    rows = [(name, f"{seconds:.1f}") for name, seconds in plan.time.phases.items()]
    rows += [
        ("one step", f"{plan.time.seconds:.1f}"),
        ("tokens/s per device", f"{plan.time.tokens / plan.time.seconds / plan.devices.total:.0f}"),
        ("MFU of the optimizer steps", f"{100 * update.mfu:.1f} %"),
    ]
    return _table("predicted, not measured: seconds", ("phase", "s"), rows)


def show(plan: Plan, console: Console) -> None:
    """Print the tables and notes; the verdict is the caller's."""
    for table in tables(plan):
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
