"""`r1reward plan`: print the plan of a run file and say whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.files import write_text
from megatron_r1reward.planner.memory import GIB
from megatron_r1reward.planner.plan import Plan, make_plan, stage_of
from megatron_r1reward.planner.plan_tables import show, to_json
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
