"""Servers on the trainer's own devices: every transition, the order of the calls, and memory that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import get_args

import pytest
import torch
from fake_vllm import MEMORY, FakeVllm, Silent, Words, prompts
from waiting import wait_until

from megatron_r1reward.config.schema import SamplingSection, ServerSection
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.command import server_command, weight_transport
from megatron_r1reward.servers.member import ServerError
from megatron_r1reward.servers.sleep import NEXT, Colocation, DeviceMemory, Phase, PhaseError, PhaseMachine
from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync import WeightPushError

SAMPLING = SamplingSection(max_tokens=8)
SECTION = ServerSection(
    health_interval_s=0.05, health_timeout_s=60.0, probe_timeout_s=60.0, startup_timeout_s=300.0, backoff_s=0.01,
    retries=0,
)  # fmt: skip
PHASES: tuple[Phase, ...] = get_args(Phase)
ROUTE: dict[Phase, tuple[Phase, ...]] = {  # a way to every phase
    "ready": (),
    "generating": ("generating",),
    "falling_asleep": ("falling_asleep",),
    "asleep": ("falling_asleep", "asleep"),
    "waking": ("falling_asleep", "asleep", "waking"),
    "unfit": ("waking", "unfit"),
    "failed": ("falling_asleep", "failed"),
}
CYCLE = [
    "POST /sleep?level=1&mode=abort",
    "POST /wake_up?tags=weights",
    "POST /pause?mode=keep&clear_cache=true",
    "POST /start_weight_update",
    "POST /finish_weight_update",
    "GET /weight_info",
    "POST /wake_up?tags=kv_cache",
    "POST /resume",
]
MakeFake = Callable[..., FakeVllm]
MakePool = Callable[..., RolloutPool]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools: list[RolloutPool] = []

    def make(*fakes: FakeVllm, sleep_level: int | None = 1, **limits: float) -> RolloutPool:
        pools.append(
            RolloutPool(
                SECTION.model_copy(update=limits), urls=[fake.url for fake in fakes], tokenizer=Words(), banned_ids=(),
                transport=Silent(), sleep_level=sleep_level,
            )
        )  # fmt: skip
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def push(pool: RolloutPool, version: int) -> None:
    tensor = torch.zeros(3)
    pool.push_weights([TensorMeta.of("w", tensor)], iter([("w", tensor)]), version=version)


def administration(fake: FakeVllm) -> list[str]:
    return [call for call in fake.calls if "/health" not in call and "/generate" not in call]


@pytest.mark.parametrize(("start", "to"), [(a, b) for a, b in product(PHASES, PHASES) if b not in NEXT[a]])
def test_an_illegal_transition_is_refused_and_changes_nothing(start: Phase, to: Phase) -> None:
    machine = PhaseMachine()
    for phase in ROUTE[start]:
        machine.go(phase)
    with pytest.raises(PhaseError, match=f"cannot go from '{start}' to '{to}': "):
        machine.go(to)
    assert machine.phase == start


@pytest.mark.parametrize(("start", "to"), [(a, b) for a, b in product(PHASES, PHASES) if b in NEXT[a]])
def test_a_legal_transition_is_made(start: Phase, to: Phase) -> None:
    machine = PhaseMachine()
    for phase in ROUTE[start]:
        machine.go(phase)
    machine.go(to)
    assert machine.phase == to


def test_generations_overlap_and_end_once() -> None:
    machine = PhaseMachine()
    first, second = machine.begin_generation(), machine.begin_generation()
    first()
    first()
    assert machine.phase == "generating"
    second()
    assert machine.phase == "ready"


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
def test_a_step_sleeps_after_sampling_and_wakes_in_two_parts(
    fake_vllm: MakeFake, make_pool: MakePool, level: int
) -> None:
    fakes = [fake_vllm(), fake_vllm()]
    pool = make_pool(*fakes, sleep_level=level)
    for version in (1, 2):
        for fake in fakes:
            fake.calls.clear()
        assert len(pool.generate(prompts(8), SAMPLING, seed=0).rollouts) == 8
        pool.sleep()
        assert all(fake.resident == set() for fake in fakes)
        push(pool, version)
        for fake in fakes:
            assert administration(fake) == [CYCLE[0].replace("level=1", f"level={level}"), *CYCLE[1:]]
            assert (fake.resident, fake.version) == (MEMORY, str(version))
    result = pool.generate(prompts(8), SAMPLING, seed=0)
    assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {2}


def test_servers_with_devices_of_their_own_are_left_awake(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm()
    pool = make_pool(fake, sleep_level=None)
    pool.sleep()
    push(pool, 1)
    assert administration(fake) == [call for call in CYCLE if "sleep" not in call and "wake" not in call]
    assert pool.sleep_metrics() == {}


def test_sleeping_servers_are_not_asked(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm()
    pool = make_pool(fake)
    pool.sleep()
    with pytest.raises(PhaseError, match="'asleep' to 'generating': they are asleep: push weights first"):
        pool.generate(prompts(1), SAMPLING, seed=0)
    with pytest.raises(PhaseError, match="'asleep' to 'falling_asleep'"):
        pool.sleep()
    assert fake.generate_calls == 0


def test_servers_that_generate_neither_sleep_nor_wake(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm()
    fake.door.close()
    pool = make_pool(fake)
    future = pool.submit(prompts(1), SAMPLING, seed=0)
    with pytest.raises(PhaseError, match="rollouts are being generated"):
        pool.sleep()
    with pytest.raises(PhaseError, match="rollouts are being generated"):
        push(pool, 1)
    fake.door.open()
    assert len(future.result().rollouts) == 1
    pool.sleep()
    assert not any("pause" in call for call in fake.calls)


def test_a_cancelled_generation_lets_them_sleep(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    pool = make_pool(fake_vllm("hang"))
    pool.submit(prompts(1), SAMPLING, seed=0).cancel()
    pool.sleep()


def test_after_a_failed_push_they_neither_sample_nor_sleep_until_a_complete_one(
    fake_vllm: MakeFake, make_pool: MakePool
) -> None:
    fake = fake_vllm()
    pool = make_pool(fake)
    pool.sleep()
    fake.refused.add("/finish_weight_update")
    with pytest.raises(WeightPushError, match="finish_weight_update answered 500"):
        push(pool, 1)
    assert "kv_cache" not in fake.resident, "who holds no fit weights gets no cache"
    with pytest.raises(WeightPushError, match="paused after a failed weight push"):
        pool.generate(prompts(1), SAMPLING, seed=0)
    with pytest.raises(PhaseError, match="'unfit' to 'falling_asleep': the last weight push failed"):
        pool.sleep()
    fake.refused.clear()
    push(pool, 2)
    assert len(pool.generate(prompts(1), SAMPLING, seed=0).rollouts) == 1


def test_a_server_that_keeps_its_memory_ends_the_run(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    good, bad = fake_vllm(), fake_vllm()
    bad.refused.add("/sleep")
    pool = make_pool(good, bad)
    with pytest.raises(ServerError, match=rf"{bad.url} keeps its memory: .*/sleep.* answered 500"):
        pool.sleep()
    with pytest.raises(PhaseError, match="'failed' to 'waking': one of them did not free its memory"):
        push(pool, 1)


@pytest.mark.slow
def test_nobody_is_brought_back_while_the_trainer_has_the_memory(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """A server that falls ill asleep is probed, and given the weights, only after the next push."""
    fakes = [fake_vllm(), fake_vllm()]
    pool = make_pool(*fakes, health_failures=1)
    push(pool, 1)
    pool.sleep()
    fakes[0].refused.add("/health")
    wait_until(lambda: pool.status()[0].state == "quarantined")
    fakes[0].refused.clear()
    fakes[0].calls.clear()
    time.sleep(0.3)
    assert fakes[0].calls == []
    push(pool, 2)
    wait_until(lambda: pool.status()[0].state == "ready")
    assert [fake.version for fake in fakes] == ["2", "2"]
    assert [fake.resident for fake in fakes] == [MEMORY, MEMORY]


class Ours:
    """A server that is ours: its first life may hang, a restart ends that life and begins one that is well."""

    token = None

    def __init__(self, first: FakeVllm, second: FakeVllm) -> None:
        self._lives = [first, second]

    @property
    def url(self) -> str:
        return self._lives[0].url

    alive = True

    def restart(self, reason: str = "") -> None:
        self._lives.pop(0).stop()

    def wait_ready(self) -> None: ...

    def stop(self, *, grace_s: float = 0.0) -> None:
        raise AssertionError("it fell asleep")

    def give_up(self, reason: str) -> None:
        raise AssertionError(reason)

    def close(self) -> None: ...


@pytest.mark.slow
def test_a_server_that_hangs_during_a_push_is_started_again_before_the_push_gives_up(fake_vllm: MakeFake) -> None:
    """Not after `push_timeout_s`: the trainer waits for nothing that will not come."""
    lives = fake_vllm(), fake_vllm()
    section = SECTION.model_copy(update={"health_timeout_s": 0.3, "health_failures": 2, "push_timeout_s": 3600.0})
    pool = RolloutPool(
        section, servers=[Ours(*lives)], tokenizer=Words(), banned_ids=(), transport=Silent(), sleep_level=1
    )
    with pool:
        push(pool, 1)
        pool.sleep()
        lives[0].hanging |= {"/finish_weight_update", "/health"}
        push(pool, 2)
        wait_until(lambda: pool.status()[0].state == "ready")
        assert (pool.status()[0].restarts, lives[1].version, lives[1].resident) == (1, "2", MEMORY)
        assert len(pool.generate(prompts(1), SAMPLING, seed=0).rollouts) == 1


def test_memory_is_measured_asleep_and_before_waking(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    free = iter([3_000_000_000, 43_000_000_000, 41_000_000_000])
    pool = make_pool(fake_vllm())
    pool._colocation = Colocation(pool.group, 1, memory=DeviceMemory(free_bytes=lambda: next(free), is_exact=True))
    pool.sleep()
    assert pool.sleep_metrics() == {"servers/free_asleep_gb": 43.0}
    push(pool, 1)
    assert pool.sleep_metrics() == {"servers/free_asleep_gb": 43.0, "servers/free_before_wake_gb": 41.0}


def test_a_trainer_that_leaves_too_little_is_told_before_servers_die_of_it(
    fake_vllm: MakeFake, make_pool: MakePool
) -> None:
    free = iter([3_000_000_000, 43_000_000_000, 39_000_000_000])
    fake = fake_vllm()
    pool = make_pool(fake)
    pool._colocation = Colocation(pool.group, 1, memory=DeviceMemory(free_bytes=lambda: next(free), is_exact=True))
    pool.sleep()
    with pytest.raises(ServerError, match=r"gave 40\.00 GB to the trainer, which leaves 39\.00 GB to wake them: lower"):
        push(pool, 1)
    assert "POST /wake_up?tags=weights" not in fake.calls


def test_memory_of_a_whole_machine_is_only_reported(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    free = iter([3_000_000_000, 43_000_000_000, 1_000_000_000])
    pool = make_pool(fake_vllm())
    pool._colocation = Colocation(pool.group, 1, memory=DeviceMemory(free_bytes=lambda: next(free), is_exact=False))
    pool.sleep()
    push(pool, 1)
    assert pool.sleep_metrics()["servers/free_before_wake_gb"] == 1.0


def test_sleep_mode_is_for_gpus(tmp_path) -> None:
    options = {"model_path": tmp_path, "port": 1, "served_name": "policy", "sleep_mode": True}
    assert "--enable-sleep-mode" in server_command(SECTION, **options)
    assert "--enable-sleep-mode" not in server_command(SECTION, on_cpu=True, **options)


def test_nccl_is_refused_between_processes_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert weight_transport(SECTION) == "nccl"
    assert weight_transport(SECTION, colocated=True) == "gloo"
    with pytest.raises(ValueError, match="'nccl' cannot reach servers on the trainer's own GPUs"):
        weight_transport(SECTION.model_copy(update={"weight_transport": "nccl"}), colocated=True)
