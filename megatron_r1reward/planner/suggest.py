"""The nearest change of a run file with which it fits."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_r1reward.cluster import legality
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner.catalog import find_model
from megatron_r1reward.planner.plan import Plan, make_plan
from megatron_r1reward.planner.planned_layout import Stage, enough_nodes, planned_devices

MAX_EVALUATIONS = 600

# A knob is a list of settings in the order in which they are tried; a setting is its cost and the keys it changes.
Setting = tuple[float, dict[str, Any]]
Knob = Sequence[Setting]


def _counts(key: str, now: int, cost: float) -> Knob:
    """One more after the other, then in larger steps; the cost follows the ratio."""
    counts = [*range(now, now + 9), *(now * 2**k for k in range(4, 7) if now * 2**k > now + 8)]
    return [(cost * math.log2(count / now), {key: count} if count > now else {}) for count in counts]


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
        _counts("plan.nodes", config.plan.nodes, 3.0),
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


def _fitting(
    config: RunConfig, stage: Stage, shape: ModelShape, changes: dict[str, Any]
) -> tuple[dict[str, Any], Plan] | None:
    """These changes, those that they make necessary, and the plan; None when it does not fit."""
    try:
        changed = _changed(config, changes)
        repairs = _repairs(changed, stage, shape)
        plan = make_plan(_changed(changed, repairs) if repairs else changed, stage)
    except (ValueError, ValidationError):
        return None
    return (changes | repairs, plan) if plan.fits else None


def _enough_room(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """More nodes, where the components do not fit on those that the run file imagines."""
    try:
        planned_devices(config, stage)
    except ValueError:
        nodes = enough_nodes(config, stage)
        return {} if nodes is None else {"plan.nodes": nodes}
    return {}


def _repairs(config: RunConfig, stage: Stage, shape: ModelShape) -> dict[str, Any]:
    """Changes that make the layout legal on its devices and give every rank a sequence; none where it is so.

    Raises:
        ValueError: there is no room for all components.
    """
    world = planned_devices(config, stage).trainer
    changes: dict[str, Any] = {}
    parallel = config.parallel
    if legality.layout_problem(shape, parallel, world) is not None:
        parallel = legality.nearest_layout(shape, parallel, world)
    if shape.text.experts is not None and parallel.tensor_model_parallel_size > 1:
        parallel = parallel.model_copy(update={"sequence_parallel": True})
    for size in range(parallel.expert_model_parallel_size, 0, -1):
        candidate = parallel.model_copy(update={"expert_model_parallel_size": size})
        if legality.layout_problem(shape, candidate, world) is None:
            parallel = candidate
            if legality.expert_problem(shape, candidate, world) is None:
                break
    now = config.parallel.model_dump()
    changes |= {f"parallel.{key}": value for key, value in parallel.model_dump().items() if value != now[key]}
    replicas = world // math.prod(
        (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size)
    )
    if stage == "sft" and config.sft.global_batch_size < replicas:
        changes["sft.global_batch_size"] = replicas
    needed = math.ceil(replicas / config.algorithm.samples_per_prompt)
    if stage == "rl" and config.rl.train_batch_size < needed:
        batches = (n for n in range(needed, config.rl.rollout_batch_size + 1) if config.rl.rollout_batch_size % n == 0)
        changes["rl.train_batch_size"] = next(batches, needed)
        if config.rl.rollout_batch_size < needed:
            changes["rl.rollout_batch_size"] = needed
    return changes


def nearest_fit(config: RunConfig, stage: Stage) -> tuple[dict[str, Any], Plan] | None:
    """The cheapest combination of changes with which the run fits, and its plan; None when the search finds none.

    Best first over a cost that prefers recomputation and sharding over more devices.
    """
    try:
        shape = find_model(config.model.path, config.plan.model).shape
    except ValueError:
        return None  # no layout helps
    start_with = _enough_room(config, stage)
    config = _changed(config, start_with)
    knobs = _knobs(config, stage, moe=shape.text.experts is not None)
    start = (0,) * len(knobs)
    queue, seen = [(0.0, start)], {start}
    for _ in range(MAX_EVALUATIONS):
        if not queue:
            return None
        cost, state = heapq.heappop(queue)
        changes: dict[str, Any] = {}
        for knob, position in zip(knobs, state, strict=True):
            changes |= knob[position][1]
        found = _fitting(config, stage, shape, changes)
        if found is not None:
            return start_with | found[0], found[1]
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
