"""Stage 2: StableReinforce. `train_step` is the page to read first.

    rollout servers -> RolloutProducer -> take_rollouts -> pack -> add_log_probs -> add_advantages -> update_policy
          ^            sampled, scored    main rank to     each rank its share, as tensors               |
          |            (or a Replay)      all ranks                                                      |
          `----------------------------------- push_weights <-------------------------------------------'

With a critic (PPO) also `add_values` before the advantages, and `update_critic`.

The main rank owns the servers and the reward; all ranks own the policy. Everything random is drawn from
(run.seed, step), so a resumed run repeats what the uninterrupted one would have done (in flight: up to the moments at
which responses switch weights, see `producer`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_r1reward.config.methods import describe
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.curriculum import Curriculum
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.data.selection import SelectedRows, select_rows
from megatron_r1reward.data.stage_data import read_training_preferences, template_of
from megatron_r1reward.monitor.sinks import Monitor, build_monitor
from megatron_r1reward.monitor.timers import PhaseTimer, Timeline
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.reward.consistency import JudgeDownError
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.run_dir import RunDir
from megatron_r1reward.training import alarms, resume
from megatron_r1reward.training.critic import add_critic, update_critic
from megatron_r1reward.training.data_parallel import make_room_for_servers, synchronize_parameters
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.loop import Stage, finish, run_to_end, set_threads
from megatron_r1reward.training.models_read import described_parts, models_read
from megatron_r1reward.training.policy_update import update_policy
from megatron_r1reward.training.producer import RolloutProducer
from megatron_r1reward.training.record import Recorder, Replay, origin_of
from megatron_r1reward.training.rl_metrics import advantage_metrics, mismatch, step_metrics
from megatron_r1reward.training.rollback import RollBackError, roll_back
from megatron_r1reward.training.rollout_batch import (
    Shards,
    add_advantages,
    add_log_probs,
    add_values,
    pack,
    share_out,
)
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.training.step_sampler import StepSampler
from megatron_r1reward.training.trained_policy import rl_policy
from megatron_r1reward.types import Preference, ScoredRollout
from megatron_r1reward.user_parts import PartError

log = logging.getLogger(__name__)
Probe = Callable[[], float]
Selected = SelectedRows[Preference]


@dataclass(frozen=True, kw_only=True)
class Services:
    """What only the main rank has: rollout servers, the reward, and a held-out accuracy probe."""

    pool: RolloutPool
    scorer: RewardScorer
    probe: Probe | None = None


@dataclass(frozen=True, kw_only=True)
class MainRank:
    """What the main rank works with: services (None in a replay), and what `run` builds on them."""

    services: Services | None
    producer: RolloutProducer | Replay
    recorder: Recorder | None = None
    monitor: Monitor
    timeline: Timeline


def train_step(state: TrainState, main: MainRank | None, timer: PhaseTimer) -> dict[str, float]:
    """One step: rollouts, log-probs, advantages, update, push. Returns its metrics (the same on every rank).

    Asynchronous modes sample the next steps' rollouts meanwhile; see `producer`.
    """
    with timer.phase("wait"):
        scored, shards, metrics = take_rollouts(state, main)
    batch = pack(state, scored, shards)
    with timer.phase("log_probs"):
        batch = add_values(state, add_log_probs(state, batch))
        batch = add_advantages(state, batch)
    metrics |= mismatch(state, batch) | advantage_metrics(state, batch)
    with timer.phase("update"):
        metrics |= update_critic(state, batch)
        if state.step >= state.config.critic.warmup_steps:
            metrics |= update_policy(state, batch)
    state.step += 1
    with timer.phase("wait"):
        if main is not None:
            main.producer.before_push()
        state.topology.from_main(None)  # no rank waits in a collective of the device while responses are sampled
    with timer.phase("push"):
        push_weights(state, None if main is None else main.services)
    return metrics


def take_rollouts(state: TrainState, main: MainRank | None) -> tuple[Sequence[ScoredRollout], Shards, dict[str, float]]:
    """This step's scored rollouts from the main rank, and who trains on which; every rank gets them."""
    message: Any = None
    if main is not None:
        try:
            batch = main.producer.take(state.step)
            pool = None if main.services is None else main.services.pool
            if pool is not None:
                pool.sleep()  # colocated servers leave the device to the trainer
            if main.recorder is not None:
                main.recorder.write(batch)
            metrics = step_metrics(batch, pool, state.config.reward)
            shards, metrics["update/imbalance"] = share_out(state, batch.scored)
            message = (batch.scored, shards, metrics)
        except (JudgeDownError, ValueError) as error:  # all ranks save together, or complain together
            message = error
    message = state.topology.from_main(message)
    if isinstance(message, Exception):
        raise message
    return message


def push_weights(state: TrainState, services: Services | None) -> None:
    """Make the current weights, under version `state.step`, current on every rollout server; collective. A replay has
    no servers."""
    if state.config.rl.replay is not None:
        return
    synchronize_parameters(state.model)
    make_room_for_servers(state.config.cluster)
    tensors = state.exporter.tensors()
    if services is None:
        for _ in tensors:  # take part in the gathering
            pass
        return
    services.pool.push_weights(state.exporter.metas, tensors, version=state.step)


def prepare(config: RunConfig, topology: Topology) -> TrainState:
    """Build the state.

    Raises:
        ValueError: the batch does not fit the layout, or the model or data cannot be used.
    """
    rollouts = config.rl.train_batch_size * config.algorithm.samples_per_prompt
    if rollouts < topology.data_parallel_size:
        raise ValueError(
            f"rl.train_batch_size {config.rl.train_batch_size} gives {rollouts} rollouts per optimizer step for "
            f"{topology.data_parallel_size} data-parallel ranks: every rank needs one"
        )
    config.sampling.check_for_rl()
    updates = (config.rl.steps - config.critic.warmup_steps) * config.rl.optimizer_steps
    with_reference = config.algorithm.needs_reference
    state = build_state(config, topology, optimizer_steps=updates, with_reference=with_reference, sampled=True)
    if config.algorithm.needs_critic:
        add_critic(state)
    return state


def run(config: RunConfig, topology: Topology, services: Services | None) -> Path | None:
    """Train to the last step and return the exported Hugging Face folder; None when it was asked to save and stop.

    `services` is None on all but the main rank, and there too when `rl.replay` names a record to train from.

    Raises:
        ValueError: the configuration or the data cannot be used.
    """
    set_threads(config)
    output = config.run.output_dir
    replay = None if config.rl.replay is None else Replay(config)
    selected, description = _data(config, topology, replay)
    control = RunControl(output, topology, total_steps=config.rl.steps)
    control.loading()
    if topology.is_main:
        log_method(config)
    state = prepare(config, topology)
    state.data, state.models = description, models_read(config, topology, rl=True)
    state.parts = described_parts(config)
    state.described = rl_policy(config, rows=description.get("rows"))
    resumed = resume.resume(state)
    resume.prepare(state)
    if replay is not None:
        replay.check_steps(state.step + 1, config.rl.steps)
    while True:
        try:
            finished = _train(state, control, services, replay or selected, resumed=resumed)
            break
        except RollBackError as alarm:
            roll_back(state, alarm)
            resumed = resume.go_on(state)
    if finished and services is not None:
        log.info("rollouts: %s", services.pool.total)
    return finish(state, control, finished=finished)


def _train(
    state: TrainState,
    control: RunControl,
    services: Services | None,
    source: Replay | Selected | None,
    *,
    resumed: bool,
) -> bool:
    """From `state.step` to the end, as `run_to_end`."""
    push_weights(state, services)  # the servers' weights are the trainer's from the first token on
    with ExitStack() as stack:
        main = None
        if state.topology.is_main:
            resumed_step = state.step if resumed else None
            main = stack.enter_context(_main_rank(state, services, source, resumed_step=resumed_step))
        control.begin(state.step, resumed=resumed)
        return run_to_end(state, _stage(state, main), control)


def log_method(config: RunConfig) -> None:
    """What is trained by, and where the loss is formed."""
    log.info("%s", describe(config))
    algorithm = config.algorithm
    if algorithm.fused_loss and not algorithm.fuses_loss:
        log.info(
            "algorithm.loss %r: the LM head's kernels form 'ppo' only, so this loss runs in plain torch behind the "
            "head's log-probs, as with algorithm.fused_loss = false",
            algorithm.loss,
        )


def _stage(state: TrainState, main: MainRank | None) -> Stage:
    """This stage to the loop that it shares with SFT."""
    config, topology = state.config, state.topology
    rollouts = 0 if config.data.curriculum else config.rl.rollout_batch_size * config.algorithm.samples_per_prompt
    run = RunDir(root=config.run.output_dir)
    best = topology.decided_by_main(lambda: alarms.best_so_far(run.metrics, state.step))
    health = alarms.Health(config.health, config.algorithm, rollouts=rollouts, best=best, speaks=topology.is_main)

    def step(timer: PhaseTimer) -> dict[str, float]:
        metrics = train_step(state, main, timer)
        if topology.is_main:
            alarms.check(metrics, config.algorithm, state.step)
        if config.health.policy == "rollback":
            metrics["health/rollbacks"] = float(state.rollbacks)
        return metrics

    def watch(metrics: dict[str, float], step: int) -> str | None:
        reason = health.check(metrics, step)
        if reason is not None and config.health.policy == "rollback" and step < config.rl.steps:
            raise RollBackError(reason, began=health.began, step=step)
        return reason

    stage = Stage(
        title="RL",
        steps=config.rl.steps,
        step=step,
        headline={"reward": "reward/mean", "right": "reward/result"},
        saves_before=(JudgeDownError, PartError),
        watch=watch,
    )
    if main is None:
        return stage

    def probe(step: int) -> Probe | None:
        every = config.rl.heldout_every
        return None if every is None or step % every or main.services is None else main.services.probe

    return replace(
        stage,
        monitor=main.monitor,
        timeline=main.timeline,
        probe=probe,
        report=lambda timer: idle_shares(main, timer),
        producer=main.producer.state,
    )


def _data(config: RunConfig, topology: Topology, replay: Replay | None) -> tuple[Selected | None, dict[str, Any]]:
    """The rows to train on, on the main rank, and on all what describes them; collective. A replay gets along without:
    then none, and the record's description.

    Raises:
        ValueError: there is no usable row, or the record is of other data.
    """
    selected = None

    def read() -> dict[str, Any]:  # by one rank: hundreds of thousands of rows on every rank would fill a node's memory
        nonlocal selected
        selected, description = _read(config, replay)
        return description

    description = topology.decided_by_main(read)
    return selected, description


def _read(config: RunConfig, replay: Replay | None) -> tuple[Selected | None, dict[str, Any]]:
    if replay is not None and not config.data.train.exists():
        log.info("data.train %s is not here: trained is on what %s recorded", config.data.train, replay.origin.run)
        return None, replay.origin.data
    data = read_training_preferences(config, "rl")
    selected = select_rows(
        data.preferences,
        config.data,
        batch_size=config.rl.rollout_batch_size // config.rl.orders,
        steps=lambda rows: config.rl.steps,
        set_aside=data.set_aside,
    )
    description = resume.describe_data(
        selected.contents,
        seed=config.run.seed,
        batch_size=config.rl.rollout_batch_size,
        order=config.response_order,
        stages=selected.description,
    )
    if replay is not None:
        replay.check_data(description)
    return selected, description


@contextmanager
def _main_rank(
    state: TrainState, services: Services | None, source: Replay | Selected | None, *, resumed_step: int | None
) -> Iterator[MainRank]:
    config, output = state.config, state.config.run.output_dir
    with ExitStack() as stack:
        monitor = build_monitor(config.monitor, output, "rl", resumed_step=resumed_step)
        stack.callback(monitor.close)
        timeline = Timeline(output / "timeline.jsonl", resumed_step=resumed_step)
        stack.callback(timeline.close)
        if isinstance(source, Replay):
            if config.rl.heldout_every is not None:
                log.warning("a replay has no servers: rl.heldout_every is left out, the updates do not depend on it")
            yield MainRank(services=None, producer=source, monitor=monitor, timeline=timeline)
            return
        assert services is not None
        assert source is not None  # only other ranks, and replays, have no rows
        producer = _producer(state, services, source, timeline)
        stack.callback(producer.close)
        recorder = None
        if config.rl.record is not None:
            recorder = Recorder(config.rl.record, origin_of(config, state.data), resumed_step=resumed_step)
        yield MainRank(services=services, producer=producer, recorder=recorder, monitor=monitor, timeline=timeline)


def _producer(state: TrainState, services: Services, selected: Selected, timeline: Timeline) -> RolloutProducer:
    config = state.config
    builder = PromptBuilder(state.tokenizer, config.data.max_prompt_tokens, template=template_of(config))
    loader = PromptLoader(
        selected.rows,
        builder,
        config.data,
        seed=config.run.seed,
        stages=selected.stages,
        both_orders=config.rl.orders == 2,
    )
    services.scorer.show(selected.rows)
    learned = json.loads(state.producer["accuracies"]) if state.producer else {}
    curriculum = Curriculum(loader, learned, contents=selected.contents)
    sampler = StepSampler(services.pool, services.scorer, loader, config, curriculum=curriculum, timeline=timeline)
    return RolloutProducer(sampler, config.asynchrony, steps=config.rl.steps, state=state.producer)


def idle_shares(main: MainRank, timer: PhaseTimer) -> dict[str, float]:
    """`idle/*` of the step that has just ended; when servers were busy goes to the timeline."""
    start, end = timer.spans["step"]
    shares = {"idle/trainer": timer.seconds["wait"] / max(end - start, 1e-9)}
    if main.services is None:
        return shares
    for name, clocks in (("generation", main.services.pool.clocks), ("judge", main.services.scorer.clocks)):
        busy = {server: clock.take(start, end) for server, clock in clocks.items()}
        for server, times in busy.items():
            for interval in times:
                main.timeline.add(server, *interval)
        if busy:
            total = sum(b - a for times in busy.values() for a, b in times)
            shares[f"idle/{name}"] = 1.0 - total / (len(busy) * max(end - start, 1e-9))
    return shares
