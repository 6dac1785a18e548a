"""Routing, retries and accounting, against servers that fail in chosen ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from fake_vllm import FakeVllm

from megatron_r1reward.config.schema import SamplingSection, ServerSection
from megatron_r1reward.rollout.client import MAX_BANNED_IDS, RolloutClient, sample_seed
from megatron_r1reward.rollout.pool import GenerateResult, LeastOutstanding, RolloutPool
from megatron_r1reward.rollout.weights import WeightPusher, WeightPushError
from megatron_r1reward.types import Prompt

SAMPLING = SamplingSection(max_tokens=8)
FAULTS = [500, 503, "drop", "hang", "garbage", "one sample short", "log-probs of other tokens", "no log-prob"]

SEED_OF_0_A = 3_420_577_078_021_437_369

MakeFake = Callable[..., FakeVllm]
MakePool = Callable[..., RolloutPool]


class Words:
    """A tokenizer whose token 4 is the image placeholder."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))

    def convert_tokens_to_ids(self, tokens: str) -> int:
        assert tokens == "<|image_pad|>"
        return 4


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", preference_id=f"p{i}", token_ids=(i + 10,), image_paths=(), label=1, swapped=False)
        for i in range(count)
    ]


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    pools: list[RolloutPool] = []

    def make(
        *fakes: FakeVllm, banned_ids: Iterable[int] = (), pusher: WeightPusher | None = None, **limits: float
    ) -> RolloutPool:
        section = ServerSection.model_validate({"request_timeout_s": 5.0, "retries": 3, **limits})
        urls = [fake.url for fake in fakes]
        pools.append(RolloutPool(section, urls=urls, tokenizer=Words(), banned_ids=banned_ids, pusher=pusher))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def accounted_for(result: GenerateResult, asked: list[Prompt], n: int) -> bool:
    """Each prompt has exactly n samples, or a reason."""
    samples = [*result.rollouts, *result.quarantined]
    counts = {prompt.id: sum(rollout.prompt.id == prompt.id for rollout in samples) for prompt in asked}
    failed = {failure.prompt.id for failure in result.failed}
    return all(counts[prompt.id] == (0 if prompt.id in failed else n) for prompt in asked)


def test_samples_come_in_the_order_of_prompts(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    asked, progress = prompts(20), []
    pool = make_pool(fake_vllm(), fake_vllm())
    result = pool.generate(asked, SAMPLING, n=3, seed=0, progress=lambda done, total: progress.append((done, total)))
    assert [(r.prompt.id, r.sample_index) for r in result.rollouts] == [(p.id, i) for p in asked for i in range(3)]
    assert progress == [(done, 20) for done in range(1, 21)]


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_takes_over(fake_vllm: MakeFake, make_pool: MakePool, fault: str | int) -> None:
    asked = prompts(6)
    bad, good = fake_vllm(fault), fake_vllm()
    result = make_pool(bad, good, request_timeout_s=0.5).generate(asked, SAMPLING, n=2, seed=0)
    assert bad.generate_calls > 0
    assert len(result.rollouts) == 12
    assert accounted_for(result, asked, 2)
    alone = make_pool(good).generate(asked, SAMPLING, n=2, seed=0)
    assert [r.token_ids for r in alone.rollouts] == [r.token_ids for r in result.rollouts], "a retry changed the seed"


@pytest.mark.parametrize("fault", FAULTS)
def test_prompts_that_nobody_can_serve_say_why(fake_vllm: MakeFake, make_pool: MakePool, fault: str | int) -> None:
    asked, bad = prompts(3), fake_vllm(fault)
    result = make_pool(bad, request_timeout_s=0.3, retries=1).generate(asked, SAMPLING, n=2, seed=0)
    assert [failure.prompt for failure in result.failed] == asked
    assert accounted_for(result, asked, 2)
    assert bad.generate_calls == 6, "one retry each"
    expected = {"drop": "RemoteProtocolError", "hang": "no answer within 0.3 s", "garbage": "did not answer with"}
    reason = result.failed[0].reason
    assert bad.url in reason
    assert expected.get(str(fault), str(fault) if isinstance(fault, int) else "did not answer with rollouts") in reason


def test_a_refusal_is_final(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    refusing, other = fake_vllm(400), fake_vllm(400)
    result = make_pool(refusing, other).generate(prompts(1), SAMPLING, seed=0)
    assert "fault 400" in result.failed[0].reason
    assert refusing.generate_calls + other.generate_calls == 1


def test_the_slow_server_gets_less(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    slow, fast = fake_vllm(delay_s=0.3), fake_vllm()
    make_pool(slow, fast, max_concurrency=2).generate(prompts(40), SAMPLING, seed=0)
    assert slow.generate_calls + fast.generate_calls == 40
    assert slow.generate_calls < 10


def test_no_more_in_flight_than_allowed(fake_vllm: MakeFake, make_pool: MakePool) -> None:
    fakes = fake_vllm(delay_s=0.02), fake_vllm(delay_s=0.02)
    make_pool(*fakes, max_concurrency=3).generate(prompts(30), SAMPLING, seed=0)
    assert all(2 <= fake.most_in_flight <= 3 for fake in fakes)


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
    class Broken(WeightPusher):
        def _connect(self) -> None:
            raise OSError("no route")

        def _transfer(self, metas: object, tensors: object) -> None:
            raise AssertionError("not reached")

        def _disconnect(self) -> None:
            pass

    fake = fake_vllm()
    pool = make_pool(fake, pusher=Broken([fake.url]))
    with pytest.raises(WeightPushError, match="no route"):
        pool.push_weights([], [], version=1)
    with pytest.raises(WeightPushError, match="no route"):
        pool.generate(prompts(1), SAMPLING, seed=0)
    assert fake.generate_calls == 0


def test_least_outstanding_avoids_what_failed_as_long_as_it_can() -> None:
    router = LeastOutstanding(3)
    with router.hold(0):
        assert router.pick(avoid=set()) == 1
        assert router.pick(avoid={1, 2}) == 0
        assert router.pick(avoid={0, 1, 2}) == 1, "all failed: the least loaded again"
        router.retire(1)
        assert router.pick(avoid=set()) == 2
    router.retire(0)
    router.retire(2)
    assert router.pick(avoid=set()) is None


def test_seeds_are_stable_and_distinct() -> None:
    assert sample_seed(0, "a") == SEED_OF_0_A, "old runs could not be repeated"
    assert len({sample_seed(seed, name) for seed in range(30) for name in "abc"}) == 90
    assert all(0 <= sample_seed(seed, "x") < 2**62 for seed in range(100))


def test_more_bans_than_vllm_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="1025 banned token ids"):
        RolloutClient("http://nowhere", model="m", tokenizer=Words(), banned_ids=range(MAX_BANNED_IDS + 1))
