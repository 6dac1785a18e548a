"""Two real servers as one pool: pushed to together, lost one after the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx
import pytest
from reference import SERVER, Reference

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.models.tiny import write_tiny_checkpoint
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.pool import SERVED_NAME, RolloutPool
from megatron_r1reward.rollout.server import ServerError, VllmServer, start_servers
from megatron_r1reward.rollout.weights import WeightPushError
from megatron_r1reward.rollout.weights_gloo import GlooWeightPusher
from megatron_r1reward.types import Prompt

pytestmark = pytest.mark.e2e
SAMPLING = SamplingSection(max_tokens=16)
PIXELS = (56 * 56, 84 * 84)  # below the checkpoint's own limit, so that images are scaled down
FUSED_PART = "model.language_model.layers.0.self_attn.q_proj."


@dataclass(frozen=True, kw_only=True)
class Duo:
    servers: list[VllmServer]
    pool: RolloutPool
    reference: Reference  # weights that are not the checkpoint's; tied embeddings
    prompts: list[Prompt]


@pytest.fixture(scope="module")
def duo(tmp_path_factory: pytest.TempPathFactory, image_paths: tuple[str, ...]) -> Iterator[Duo]:
    folder = tmp_path_factory.mktemp("tied")
    write_tiny_checkpoint(folder, corpus=["Which digit is shown?"] * 4, tie_word_embeddings=True, init_std=0.15)
    reference = Reference(folder, min_pixels=PIXELS[0], max_pixels=PIXELS[1]).redrawn(seed=2)
    servers = [
        VllmServer(
            SERVER,
            model_path=folder,
            log_path=folder / f"server-{index}.log",
            served_name=SERVED_NAME,
            weight_transfer="gloo",
            media_root=Path("/"),
            pixels=PIXELS,
        )
        for index in range(2)
    ]
    start_servers(servers)
    urls = [server.url for server in servers]
    with RolloutPool(
        SERVER,
        urls=urls,
        tokenizer=reference.tokenizer,
        banned_ids=banned_token_ids(folder),
        servers=servers,
        pusher=GlooWeightPusher(urls, timeout_s=60, bucket_bytes=100_000),
    ) as pool:
        prompts = [reference.prompt(f"{i}", "Which digit?", image_paths[i % 3]) for i in range(8)]
        yield Duo(servers=servers, pool=pool, reference=reference, prompts=prompts)


def test_two_servers_are_pushed_to_together_and_survive_each_other(duo: Duo) -> None:
    """One story, because every step destroys a little more."""
    both_serve_the_pushed_weights(duo)
    one_death_loses_no_prompt(duo)
    an_interrupted_push_is_noticed_at_once(duo)
    a_partial_push_leaves_the_server_paused(duo)
    the_last_death_names_the_log(duo)


def both_serve_the_pushed_weights(duo: Duo) -> None:
    duo.pool.generate(duo.prompts, SAMPLING, seed=0)
    duo.pool.push_weights(*duo.reference.weights(), version=3)
    result = duo.pool.generate(duo.prompts, SAMPLING, seed=0)
    assert len(result.rollouts) == 8
    assert all(rollout.weight_spans[0].version == 3 for rollout in result.rollouts)
    assert max(map(duo.reference.error, result.rollouts)) < 1e-3
    for server in duo.servers:  # least outstanding: every other prompt
        assert "vllm:request_success" in httpx.get(f"{server.url}/metrics").text
        assert httpx.get(f"{server.url}/weight_info").json() == {"weight_version": "3"}


def one_death_loses_no_prompt(duo: Duo) -> None:
    pid = duo.servers[0].pid
    assert pid is not None

    def kill_after_the_first(done: int, total: int) -> None:
        if done == 1:
            os.killpg(pid, signal.SIGKILL)

    result = duo.pool.generate(duo.prompts, SamplingSection(max_tokens=200), n=4, seed=1, progress=kill_after_the_first)
    assert len(result.rollouts) == 32
    assert not result.failed
    with pytest.raises(WeightPushError, match=duo.servers[0].url):
        duo.pool.push_weights(*duo.reference.weights(), version=4)
    with pytest.raises(WeightPushError, match="paused"):
        duo.pool.generate(duo.prompts, SAMPLING, seed=0)
    until_paused(duo.servers[1].url)


def an_interrupted_push_is_noticed_at_once(duo: Duo) -> None:
    """Both ends: the trainer's error is reported, and the server's worker does not wait for the time-out."""
    survivor = duo.servers[1].url
    pusher = GlooWeightPusher([survivor], timeout_s=60, bucket_bytes=10_000)
    metas, tensors = duo.reference.weights()
    started = time.monotonic()
    with pytest.raises(WeightPushError, match=f"end before {metas[20].name}"):
        pusher.push(metas, islice(tensors, 20), version=5)
    pusher.close()
    assert httpx.get(f"{survivor}/is_paused").json() == {"is_paused": True}
    httpx.post(f"{survivor}/pause", params={"mode": "keep"})  # answered only when the worker is free again
    assert time.monotonic() - started < 30


def a_partial_push_leaves_the_server_paused(duo: Duo) -> None:
    survivor = duo.servers[1].url
    pusher = GlooWeightPusher([survivor], timeout_s=60)
    with pytest.raises(WeightPushError, match=r"only a part of the weights of .*qkv_proj came"):
        pusher.push(*duo.reference.weights(FUSED_PART), version=5)
    assert httpx.get(f"{survivor}/is_paused").json() == {"is_paused": True}
    with pytest.raises(WeightPushError, match="restart the servers"):
        pusher.push(*duo.reference.weights(), version=6)
    pusher.close()


def the_last_death_names_the_log(duo: Duo) -> None:
    pid = duo.servers[1].pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    pool = RolloutPool(
        SERVER.model_copy(update={"retries": 1}),
        urls=duo.pool.urls,
        tokenizer=duo.reference.tokenizer,
        banned_ids=(),
        servers=duo.servers,
    )
    with pytest.raises(ServerError, match=r"server-0\.log"):
        pool.generate(duo.prompts, SAMPLING, seed=0)


def until_paused(url: str) -> None:
    deadline = time.monotonic() + 10
    while not httpx.get(f"{url}/is_paused").json()["is_paused"]:
        assert time.monotonic() < deadline, f"{url} still serves after a failed push"
        time.sleep(0.05)
