"""The nearest change of a run file with which it fits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.parallel import legality
from megatron_r1reward.planner.catalog import find_model
from megatron_r1reward.planner.plan import Plan, make_plan
from megatron_r1reward.planner.planned_layout import Stage
from megatron_r1reward.planner.planned_placement import planned_devices

MAX_EVALUATIONS = 600

# A knob is a list of settings in the order in which they are tried; a setting is its cost and the keys it changes.
Setting = tuple[float, dict[str, Any]]
Knob = Sequence[Setting]


def _sizes(key: str, now: int, cost: float, most: int) -> Knob:
    sizes = [now * 2**k for k in range(5) if now * 2**k <= max(most, now)]
    return [(cost * k, {key: size} if k else {}) for k, size in enumerate(sizes)]


def _switch(key: str, value: Any, cost: float, *, useful: bool) -> Knob:
    return [(0.0, {}), (cost, {key: value})] if useful else [(0.0, {})]


def _knobs(config: RunConfig, stage: Stage, *, moe: bool) -> list[Knob]:
    """What may be changed, cheap in speed first: recomputation and sharding before more devices."""
    parallel, node = config.parallel, config.plan.gpus_per_node
    modes = ["none", "selective", "full"]
    modes = modes[modes.index(parallel.recompute) :]
    knobs: list[Knob] = [
        _switch("parallel.use_distributed_optimizer", True, 0.1, useful=not parallel.use_distributed_optimizer),
        _switch("parallel.sequence_parallel", True, 0.1, useful=not parallel.sequence_parallel),
        [(0.5 * i, {"parallel.recompute": mode} if i else {}) for i, mode in enumerate(modes)],
        _switch("parallel.recompute_vision", True, 0.6, useful=not parallel.recompute_vision),
        [(0.9 * k, {"data.token_budget": config.data.token_budget // 2**k} if k else {}) for k in range(3)],
        _sizes("parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size, 1.0, node),
        _sizes("parallel.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size, 1.5, 16),
        _sizes("parallel.context_parallel_size", parallel.context_parallel_size, 1.5, node),
        _sizes("plan.nodes", config.plan.nodes, 3.0, 16 * config.plan.nodes),
    ]
    if moe:
        knobs.append(_sizes("parallel.expert_model_parallel_size", parallel.expert_model_parallel_size, 0.8, 64))
    if stage == "rl":
        knobs += _server_knobs(config)
    return knobs


def _server_knobs(config: RunConfig) -> list[Knob]:
    knobs: list[Knob] = []
    for kind, section in (("rollout", config.rollout), ("judge", config.judge)):
        settings: list[Setting] = [(0.0, {})]
        size, count = section.tensor_parallel_size, section.count
        while size < config.plan.gpus_per_node:
            size, count = 2 * size, max(count // 2, 1)
            settings.append((len(settings), {f"{kind}.tensor_parallel_size": size, f"{kind}.count": count}))
        knobs.append(settings)
    steps = [u / 10 for u in range(9, 1, -1)]
    now = config.rollout.gpu_memory_utilization
    colocated = config.cluster.layout == "colocated"
    candidates = [u for u in steps if u < now] if colocated else [u for u in reversed(steps) if u > now]
    knobs.append(
        [(0.0, {})] + [(0.3 * (i + 1), {"rollout.gpu_memory_utilization": u}) for i, u in enumerate(candidates)]
    )
    return knobs


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    tree = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return RunConfig.model_validate(tree)


def _fitting(config: RunConfig, stage: Stage, changes: dict[str, Any]) -> Plan | None:
    try:
        plan = make_plan(_changed(config, changes), stage)
    except (ValueError, ValidationError):
        return None
    return plan if plan.fits else None


def _legal_start(config: RunConfig, stage: Stage, shape: ModelShape) -> dict[str, Any]:
    """Changes that make the trainer's layout legal, none where it is."""
    try:
        world = planned_devices(config, stage).trainer
    except ValueError:  # no room for all components: more nodes come first
        return {}
    if legality.layout_problem(shape, config.parallel, world) is None:
        return {}
    nearest = legality.nearest_layout(shape, config.parallel, world).model_dump()
    now = config.parallel.model_dump()
    return {f"parallel.{key}": value for key, value in nearest.items() if value != now[key]}


def nearest_fit(config: RunConfig, stage: Stage) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest combination of changes with which the run fits, and its plan; None when the search finds none.

    Best first over a cost that prefers recomputation and sharding over more devices.
    """
    try:
        shape = find_model(config.model.path, config.plan.model).shape
    except ValueError:
        return None  # no layout helps
    legal = _legal_start(config, stage, shape)
    knobs = _knobs(_changed(config, legal), stage, moe=shape.text.experts is not None)
    start = (0,) * len(knobs)
    queue, seen = [(0.0, start)], {start}
    for _ in range(MAX_EVALUATIONS):
        if not queue:
            return None
        cost, state = heapq.heappop(queue)
        changes = dict(legal)
        for knob, position in zip(knobs, state, strict=True):
            changes |= knob[position][1]
        plan = _fitting(config, stage, changes)
        if plan is not None:
            return changes, plan
        for index, position in enumerate(state):
            if position + 1 < len(knobs[index]):
                following = (*state[:index], position + 1, *state[index + 1 :])
                if following not in seen:
                    seen.add(following)
                    heapq.heappush(queue, (cost + knobs[index][position + 1][0] - knobs[index][position][0], following))
    return None


def as_overrides(changes: dict[str, Any]) -> str:
    """The changes as `section.key=value` arguments of any subcommand."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )
