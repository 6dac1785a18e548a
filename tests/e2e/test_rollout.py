"""Rollouts and weight pushes against one real vLLM server, judged by transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import Reference, requests_running
from waiting import wait_until

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.client import RolloutClient
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.types import Prompt, Rollout

pytestmark = pytest.mark.e2e
SAMPLING = SamplingSection(max_tokens=24)
TOLERANCE = 1e-3  # float32 on both sides, different kernels


def tokens(result: GenerateResult) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in result.rollouts]


def versions(rollout: Rollout) -> list[int]:
    return [span.version for span in rollout.weight_spans]


@pytest.fixture(scope="module")
def prompts(reference: Reference, image_paths: tuple[str, ...]) -> list[Prompt]:
    return [
        reference.prompt("text", "Which digit is shown?"),
        reference.prompt("image", "Which response is better?", image_paths[1]),
        reference.prompt("two images", "Which of 1 and 2?", image_paths[0], image_paths[2]),
    ]


@pytest.fixture(scope="module")
def other(tiny_folder: Path) -> Reference:
    """The same architecture and tokenizer, other weights."""
    return Reference(tiny_folder).redrawn(seed=1)


@pytest.fixture
def restored_pool(shared_pool: RolloutPool, reference: Reference) -> Iterator[RolloutPool]:
    """The shared pool, with its original weights before and after."""
    yield shared_pool
    shared_pool.push_weights(*reference.weights(), version=0)


def test_log_probs_are_those_of_transformers(
    shared_pool: RolloutPool, reference: Reference, prompts: list[Prompt]
) -> None:
    result = shared_pool.generate(prompts, SAMPLING.model_copy(update={"temperature": 0.7}), n=2, seed=0)
    assert [(r.prompt.id, r.sample_index) for r in result.rollouts] == [(p.id, i) for p in prompts for i in range(2)]
    assert not result.failed
    assert not result.quarantined
    for rollout in result.rollouts:
        assert len(rollout.log_probs) == len(rollout.token_ids) <= SAMPLING.max_tokens
        assert reference.error(rollout) < TOLERANCE  # untempered, and unaware of the ban
        assert [(span.version, span.start, span.end) for span in rollout.weight_spans] == [
            (0, 0, len(rollout.token_ids))
        ]
        assert rollout.text == reference.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)


def test_a_stopped_response_includes_its_end_token(
    shared_pool: RolloutPool, reference: Reference, prompts: list[Prompt]
) -> None:
    result = shared_pool.generate(prompts[:1], SamplingSection(max_tokens=400), n=16, seed=0)
    stopped = [rollout for rollout in result.rollouts if rollout.finish_reason == "stop"]
    assert stopped, "no sample ended by itself"
    for rollout in result.rollouts:
        ended = rollout.token_ids[-1] == reference.tokenizer.eos_token_id
        assert ended == (rollout.finish_reason == "stop")
        assert "<|im_end|>" not in rollout.text


def test_a_seed_fixes_the_tokens(shared_pool: RolloutPool, prompts: list[Prompt]) -> None:
    first = shared_pool.generate(prompts, SAMPLING, n=2, seed=5)
    assert tokens(shared_pool.generate(prompts, SAMPLING, n=2, seed=5)) == tokens(first)
    assert tokens(shared_pool.generate(prompts[::-1], SAMPLING, n=3, seed=5))[6:8] == tokens(first)[:2]
    assert tokens(shared_pool.generate(prompts, SAMPLING, n=2, seed=6)) != tokens(first)
    assert first.rollouts[0].token_ids != first.rollouts[1].token_ids


def test_seeded_requests_survive_a_batch_that_exceeds_the_token_budget(
    shared_pool: RolloutPool, reference: Reference, image_paths: tuple[str, ...]
) -> None:
    """vLLM splits the prefill of a prompt that no longer fits; with a seed that used to kill the engine on a CPU."""
    prompts = [reference.prompt(f"long-{i}", f"{i} " * 300, image_paths[i % 3]) for i in range(64)]
    assert sum(len(prompt.token_ids) for prompt in prompts) > 2 * 8192
    result = shared_pool.generate(prompts, SamplingSection(max_tokens=2), seed=0)
    assert len(result.rollouts) == 64


def test_banned_ids_are_never_sampled(
    shared_pool: RolloutPool, reference: Reference, tiny_folder: Path, prompts: list[Prompt]
) -> None:
    banned = banned_token_ids(tiny_folder)
    result = shared_pool.generate(prompts, SAMPLING, n=8, seed=0)
    assert all(banned.isdisjoint(rollout.token_ids) for rollout in result.rollouts)
    assert not result.quarantined

    async def without_ban() -> list[Rollout]:
        member = shared_pool.group.members[0]
        client = RolloutClient(member.url, model=SERVED_NAME, tokenizer=reference.tokenizer, token=member.bearer_token)
        try:
            return await client.generate(prompts[0], SAMPLING, n=8, seed=0)
        finally:
            await client.aclose()

    assert not all(banned.isdisjoint(rollout.token_ids) for rollout in asyncio.run(without_ban()))


def test_a_bad_prompt_fails_alone(
    shared_pool: RolloutPool, reference: Reference, prompts: list[Prompt], tmp_path: Path
) -> None:
    not_an_image = tmp_path / "not an image.png"
    not_an_image.write_text("hello")
    bad = [
        reference.prompt("missing", "?", str(tmp_path / "missing.png")),
        reference.prompt("not an image", "?", str(not_an_image)),
        reference.prompt("too long", "long " * 2000),
        Prompt(**{**vars(prompts[1]), "id": "image left out", "image_paths": ()}),
    ]
    result = shared_pool.generate([*bad, *prompts], SAMPLING, seed=0)
    assert [rollout.prompt.id for rollout in result.rollouts] == [prompt.id for prompt in prompts]
    reasons = {failure.prompt.id: failure.reason for failure in result.failed}
    assert list(reasons) == [prompt.id for prompt in bad]
    assert "missing.png does not exist" in reasons["missing"]
    assert "cannot identify image file" in reasons["not an image"]
    assert "1024" in reasons["too long"]
    assert "1 <|image_pad|> in the prompt, but 0 images" in reasons["image left out"]


def test_pushed_weights_are_served_at_once(
    restored_pool: RolloutPool, reference: Reference, other: Reference, prompts: list[Prompt]
) -> None:
    before = restored_pool.generate(prompts, SAMPLING, seed=0)  # fills the prefix, image and encoder caches
    restored_pool.push_weights(*other.weights(), version=7)
    after = restored_pool.generate(prompts, SAMPLING, seed=0)
    assert [versions(rollout) for rollout in after.rollouts] == [[7]] * len(prompts)
    for rollout in after.rollouts:
        assert other.error(rollout) < TOLERANCE
        assert reference.error(rollout) > 1
    restored_pool.push_weights(*reference.weights(), version=8)
    assert tokens(restored_pool.generate(prompts, SAMPLING, seed=0)) == tokens(before)


def test_a_push_in_mid_response_switches_the_weights_at_the_span(
    restored_pool: RolloutPool, reference: Reference, other: Reference, prompts: list[Prompt]
) -> None:
    long = SamplingSection(max_tokens=400)
    for _ in range(5):  # a busy machine may push too late
        future = restored_pool.submit(prompts, long, n=4, seed=0)
        wait_until(lambda: requests_running(restored_pool) >= 12 or future.done())  # noqa: B023
        restored_pool.push_weights(*other.weights(), version=1)
        switched = [rollout for rollout in future.result().rollouts if versions(rollout) == [0, 1]]
        if switched:
            break
        restored_pool.push_weights(*reference.weights(), version=0)
    assert switched, "no response was in flight during the push"
    for rollout in switched:
        switch = rollout.weight_spans[1].start
        served = torch.tensor(rollout.log_probs)
        torch.testing.assert_close(reference.log_probs(rollout)[:switch], served[:switch], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(other.log_probs(rollout)[switch:], served[switch:], atol=TOLERANCE, rtol=0)
