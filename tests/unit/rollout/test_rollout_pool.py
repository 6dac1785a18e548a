"""Routing, retries and accounting, against servers that fail in chosen ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm, Silent, Words, prompts
from waiting import wait_until

from megatron_r1reward.config.schema import SamplingSection, ServerSection
from megatron_r1reward.rollout.client import MAX_BANNED_IDS, RolloutClient, sample_seed
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool
from megatron_r1reward.servers.member import ServerError, read_status
from megatron_r1reward.types import Prompt, TensorMeta
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.protocol import Transport

SAMPLING = SamplingSection(max_tokens=8)
FAULTS = [500, 503, "drop", "hang", "garbage", "one sample short", "log-probs of other tokens", "no log-prob"]

# Short pauses for servers that answer at once; long limits, which a busy machine must not reach.
SHORT = {
    "request_timeout_s": 120.0,
    "retries": 3,
    "backoff_s": 0.01,
    "backoff_max_s": 0.1,
    "health_interval_s": 0.05,
    "health_timeout_s": 60.0,
    "probe_timeout_s": 60.0,
    "startup_timeout_s": 300.0,
    "request_failures": 1000,  # no quarantine unless the test is about it
}
SEED_OF_0_A = 3_420_577_078_021_437_369

MakeFake = Callable[..., FakeVllm]
MakePool = Callable[..., RolloutPool]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools: list[RolloutPool] = []

    def make(
        *fakes: FakeVllm,
        banned_ids: Iterable[int] = (),
        transport: Transport | None = None,
        status_file: Path | None = None,
        **limits: float,
    ) -> RolloutPool:
        section = ServerSection.model_validate(SHORT | limits)
        urls = [fake.url for fake in fakes]
        pools.append(
            RolloutPool(
                section,
                urls=urls,
                tokenizer=Words(),
                banned_ids=banned_ids,
                transport=transport,
                status_file=status_file,
            )
        )
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def limits_of(fault: str | int) -> dict[str, float]:
    """A short limit only where it is what the test waits for; more attempts there, as it may strike a good server."""
    return {"request_timeout_s": 2.0, "retries": 10} if fault == "hang" else {}


def accounted_for(result: GenerateResult, asked: list[Prompt], n: int) -> bool:
    """Each prompt has exactly n samples, or a reason."""
    samples = [*result.rollouts, *result.quarantined]
    counts = {prompt.id: sum(rollout.prompt.id == prompt.id for rollout in samples) for prompt in asked}
    failed = {failure.prompt.id for failure in result.failed}
    return all(counts[prompt.id] == (0 if prompt.id in failed else n) for prompt in asked)


@pytest.mark.slow
def test_samples_come_in_the_order_of_prompts(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    asked, progress = prompts(20), []
    pool = make_pool(fake_vllm(), fake_vllm())
    result = pool.generate(asked, SAMPLING, n=3, seed=0, progress=lambda done, total: progress.append((done, total)))
    assert [(r.prompt.id, r.sample_index) for r in result.rollouts] == [(p.id, i) for p in asked for i in range(3)]
    assert progress == [(done, 20) for done in range(1, 21)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_takes_over(fake_vllm: MakeFake, make_pool: MakePool, fault: str | int) -> None:
    asked = prompts(6)
    bad, good = fake_vllm(fault), fake_vllm()
    result = make_pool(bad, good, **limits_of(fault)).generate(asked, SAMPLING, n=2, seed=0)
    assert result.accounting.retried > 0
    assert len(result.rollouts) == 12
    assert accounted_for(result, asked, 2)
    alone = make_pool(good).generate(asked, SAMPLING, n=2, seed=0)
    assert [r.token_ids for r in alone.rollouts] == [r.token_ids for r in result.rollouts], "a retry changed the seed"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_prompts_that_nobody_can_serve_say_why(fake_vllm: MakeFake, make_pool: MakePool, fault: str | int) -> None:
    asked, bad = prompts(3), fake_vllm(fault)
    result = make_pool(bad, **limits_of(fault) | {"retries": 1}).generate(asked, SAMPLING, n=2, seed=0)
    assert [failure.prompt for failure in result.failed] == asked
    assert accounted_for(result, asked, 2)
    assert result.accounting.attempts == 6, "one retry each"
    assert bad.generate_calls == 6 or fault == "hang", "a busy machine may let the time pass before it has sent any"
    expected = {"drop": "RemoteProtocolError", "hang": "no answer within 2 s", "garbage": "did not answer with"}
    reason = result.failed[0].reason
    assert bad.url in reason
    assert expected.get(str(fault), str(fault) if isinstance(fault, int) else "did not answer with rollouts") in reason


def test_a_refusal_is_final(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    refusing, other = fake_vllm(400), fake_vllm(400)
    result = make_pool(refusing, other).generate(prompts(1), SAMPLING, seed=0)
    assert "fault 400" in result.failed[0].reason
    assert refusing.generate_calls + other.generate_calls == 1


@pytest.mark.slow
def test_the_slow_server_gets_less(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    slow, fast = fake_vllm(), fake_vllm()
    slow.door.close()
    generation = make_pool(slow, fast, max_concurrency=2).submit(prompts(40), SAMPLING, seed=0)
    wait_until(lambda: fast.generate_calls == 38)
    slow.door.open()
    assert len(generation.result().rollouts) == 40
    assert slow.generate_calls == 2


def test_no_more_in_flight_than_allowed(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fakes = fake_vllm(), fake_vllm()
    for fake in fakes:
        fake.door.close()
    pool = make_pool(*fakes, max_concurrency=3)
    generation = pool.submit(prompts(30), SAMPLING, seed=0)
    wait_until(lambda: [fake.door.inside for fake in fakes] == [3, 3])
    assert [server.in_flight for server in pool.status()] == [3, 3]
    assert pool.group.router.waiting == 24
    for fake in fakes:
        fake.door.open()
    assert len(generation.result().rollouts) == 30
    assert [fake.door.most for fake in fakes] == [3, 3]


@pytest.mark.slow
def test_rollouts_with_banned_ids_are_set_aside(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    asked = prompts(50)
    banned = {sample_seed(0, asked[7].id) % 97}
    result = make_pool(fake_vllm(), banned_ids=banned).generate(asked, SAMPLING, seed=0)
    assert asked[7] in [rollout.prompt for rollout in result.quarantined]
    assert all(banned.isdisjoint(rollout.token_ids) for rollout in result.rollouts)
    assert accounted_for(result, asked, 1)


def test_impossible_sample_counts_are_refused(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    pool = make_pool(fake_vllm(), max_num_seqs=4)
    with pytest.raises(ValueError, match="5 samples per prompt exceed max_num_seqs 4"):
        pool.generate(prompts(1), SAMPLING, n=5, seed=0)
    with pytest.raises(ValueError, match="temperature 0 would draw 2 equal samples"):
        pool.generate(prompts(1), SamplingSection(temperature=0), n=2, seed=0)


def test_no_rollouts_from_servers_in_an_unknown_state(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    class Broken(Transport):
        device = torch.device("cpu")

        def connect(self, control: object, source: object) -> None:
            raise OSError("no route")

        def send(self, control: object, update: object, source: object) -> None:
            raise AssertionError("not reached")

        def disconnect(self) -> None:
            pass

    fake = fake_vllm()
    pool = make_pool(fake, transport=Broken())
    with pytest.raises(WeightPushError, match="no route"):
        pool.push_weights([], [], version=1)
    with pytest.raises(WeightPushError, match="no route"):
        pool.generate(prompts(1), SAMPLING, seed=0)
    assert fake.generate_calls == 0


@pytest.mark.slow
def test_a_sick_server_leaves_service_and_comes_back(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """It answers 500 to everything, the probe included, until it is well again."""
    sick, well = fake_vllm(500), fake_vllm()
    sick.refused.add("/v1/completions")
    pool = make_pool(sick, well, request_failures=2, max_concurrency=2)
    result = pool.generate(prompts(20), SAMPLING, seed=0)
    assert len(result.rollouts) == 20
    tried = sick.generate_calls
    assert tried <= 4, "two failures, and what was in flight beside them"
    assert [server.state for server in pool.status()] == ["quarantined", "ready"]
    sick.fault = "ok"
    sick.refused.clear()
    wait_until(lambda: pool.status()[0].state == "ready")
    assert pool.generate(prompts(20), SAMPLING, seed=0).accounting.attempts == 20
    assert sick.generate_calls > tried


@pytest.mark.slow
def test_prompts_wait_while_no_server_is_in_service(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm(500)
    fake.refused.add("/health")
    pool = make_pool(fake, request_failures=1, retries=2)
    waiting = pool.submit(prompts(30), SAMPLING, seed=0)
    wait_until(lambda: pool.status()[0].state == "quarantined")
    time.sleep(0.3)
    assert not waiting.done()
    fake.fault = "ok"
    fake.refused.clear()
    assert len(waiting.result(120).rollouts) == 30


def test_a_server_that_stays_away_is_given_up(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm(500)
    fake.refused.add("/health")
    pool = make_pool(fake, request_failures=1, startup_timeout_s=0.3)
    with pytest.raises(ServerError, match=r"all 1 servers have been given up.*/health refused"):
        pool.generate(prompts(1), SAMPLING, seed=0)


def test_a_server_that_hangs_loses_its_requests_to_others(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """Long before the time-out of a request: the health check tells."""
    hung, well = fake_vllm("hang"), fake_vllm()
    pool = make_pool(hung, well, request_timeout_s=600.0, health_failures=2)
    generation = pool.submit(prompts(8), SAMPLING, seed=0)
    wait_until(lambda: hung.door.inside > 0)
    hung.refused.add("/health")
    result = generation.result()
    assert len(result.rollouts) == 8
    assert result.accounting.withdrawn >= 1
    assert result.accounting.attempts == 8 + result.accounting.withdrawn


def test_answers_of_outdated_weights_are_thrown_away(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """A server that somebody restarted serves its first weights; it gets the current ones before it may go on."""
    fakes = fake_vllm(), fake_vllm()
    pool = make_pool(*fakes, transport=Silent())
    weight = torch.arange(4.0)
    pool.push_weights([TensorMeta.of("w", weight)], [("w", weight)], version=3)
    fakes[0].version = "default"
    result = pool.generate(prompts(8), SAMPLING, seed=0)
    assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {3}
    assert result.accounting.stale >= 1
    wait_until(lambda: pool.status()[0].state == "ready")
    assert fakes[0].version == "3"


@pytest.mark.slow
def test_who_missed_a_push_gets_it_before_it_works_again(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    sick, well = fake_vllm(500), fake_vllm()
    sick.refused.add("/v1/completions")
    pool = make_pool(sick, well, transport=Silent(), request_failures=1)
    weight = torch.arange(4.0)
    for version in (1, 2):
        pool.push_weights([TensorMeta.of("w", weight)], [("w", weight)], version=version)
        pool.generate(prompts(8), SAMPLING, seed=0)
    assert [server.state for server in pool.status()] == ["quarantined", "ready"]
    sick.fault = "ok"
    sick.refused.clear()
    wait_until(lambda: pool.status()[0].state == "ready")
    assert (sick.version, well.version) == ("2", "2")
    assert [server.weight_version for server in pool.status()] == [2, 2]
    result = pool.generate(prompts(8), SAMPLING, seed=1)
    assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {2}
    assert result.accounting.stale == 0


def test_an_answer_that_missed_a_push_is_thrown_away(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """A server came into service while the others were being pushed to: it would go on with the old weights."""
    late, well = fake_vllm(), fake_vllm()
    pool = make_pool(late, well, transport=Silent())
    weight = torch.arange(4.0)
    pool.push_weights([TensorMeta.of("w", weight)], [("w", weight)], version=1)
    late.keeps_version = True
    pool.group.members[0].state = "starting"  # takes no part in the push
    pool.push_weights([TensorMeta.of("w", weight)], [("w", weight)], version=2)
    pool.group.members[0].state = "ready"
    late.keeps_version = False
    result = pool.generate(prompts(8), SAMPLING, seed=0)
    assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {2}
    assert result.accounting.stale > 0
    wait_until(lambda: pool.status()[0].state == "ready" and late.version == "2")


def test_work_goes_on_in_the_background(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fake = fake_vllm()
    fake.door.close()
    pool = make_pool(fake, max_concurrency=4)
    first, second = (pool.submit(part, SAMPLING, seed=0) for part in (prompts(8), prompts(12)[8:]))
    assert not first.done()
    fake.door.open()
    assert (len(second.result(120).rollouts), len(first.result(120).rollouts)) == (4, 8)
    fake.door.close()
    given_up = pool.submit(prompts(8), SAMPLING, seed=0)
    wait_until(lambda: fake.door.inside == 4)
    given_up.cancel()
    wait_until(lambda: pool.status()[0].in_flight == 0)
    assert fake.door.inside == 4, "slots of cancelled requests are free again, whatever the server does with them"
    fake.door.open()
    assert len(pool.generate(prompts(3), SAMPLING, seed=0).rollouts) == 3


def test_the_state_of_the_servers_is_in_a_file(fake_vllm: MakeFake, make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(fake_vllm(), status_file=tmp_path / "live" / "rollout-servers.json")
    pool.generate(prompts(5), SAMPLING, seed=0)
    wait_until(lambda: [row.requests for row in read_status(tmp_path / "live")] == [5])
    assert read_status(tmp_path / "live") == pool.status()


def test_equal_prompt_ids_are_refused(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    with pytest.raises(ValueError, match="'p0' occurs twice"):
        make_pool(fake_vllm()).generate([*prompts(2), *prompts(1)], SAMPLING, seed=0)


def test_samples_of_one_prompt_stay_together(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    """Prefix affinity: the server that has a prompt's prefix cached gets it again, unless it is much busier."""
    fakes = [fake_vllm() for _ in range(3)]
    pool = make_pool(*fakes)
    for step in range(6):
        pool.generate(prompts(1), SAMPLING, seed=step)
    assert sorted(fake.generate_calls for fake in fakes) == [0, 0, 6]


def test_images_cannot_leave_their_folders(fake_vllm: MakeFake, tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "secret.png"
    inside.mkdir()
    outside.write_bytes(b"x")
    (inside / "ok.png").write_bytes(b"x")
    (inside / "link.png").symlink_to(outside)
    paths = [inside / "ok.png", outside, inside / "link.png", inside / ".." / "secret.png"]
    asked = [
        Prompt(id=str(i), preference_id=str(i), token_ids=(4,), image_paths=(str(path),), label=1, swapped=False)
        for i, path in enumerate(paths)
    ]
    fake = fake_vllm()
    section = ServerSection.model_validate(SHORT)
    with RolloutPool(section, urls=[fake.url], tokenizer=Words(), banned_ids=(), media_roots=[inside]) as pool:
        result = pool.generate(asked, SAMPLING, seed=0)
    assert [rollout.prompt.id for rollout in result.rollouts] == ["0"]
    assert all("outside of the folders" in failure.reason for failure in result.failed)
    assert len(result.failed) == 3


def test_seeds_are_stable_and_distinct() -> None:
    assert sample_seed(0, "a") == SEED_OF_0_A, "old runs could not be repeated"
    assert len({sample_seed(seed, name) for seed in range(30) for name in "abc"}) == 90
    assert all(0 <= sample_seed(seed, "x") < 2**62 for seed in range(100))


def test_more_bans_than_vllm_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="1025 banned token ids"):
        RolloutClient("http://nowhere", model="m", tokenizer=Words(), banned_ids=range(MAX_BANNED_IDS + 1))
