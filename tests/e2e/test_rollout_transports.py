"""Weight transports to real servers: over TCP to two tensor-parallel workers, and through shared memory (colocated)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from family import scale_with_yarn
from reference import PATIENCE_S, SERVER, Reference

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.network.server_api import call, open_client
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.open_pool import build_transport
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.servers.keeper import shared_memory_of
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.types import Prompt
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import ControlPlane

pytestmark = pytest.mark.e2e
SAMPLING = SamplingSection(max_tokens=16)
PIXELS = (56 * 56, 84 * 84)  # below the checkpoint's own limit, so that images are scaled down
FUSED_PART = "model.language_model.layers.0.self_attn.q_proj."
SECTIONS = {
    "gloo": SERVER.model_copy(
        update={"tensor_parallel_size": 2, "weight_transport": "gloo", "weight_bucket_bytes": 100_000}
    ),
    "ipc": SERVER.model_copy(update={"weight_transport": "ipc", "weight_bucket_bytes": 100_000}),
}
SLEEP_LEVELS = {"gloo": None, "ipc": 1}  # who shares a device shares its memory


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Weights that are not the checkpoint's; tied embeddings; YaRN, which vLLM by itself computes otherwise."""
    folder = tmp_path_factory.mktemp("tied")
    write_tiny_checkpoint(folder, corpus=["Which digit is shown?"] * 4, tie_word_embeddings=True, init_std=0.15)
    scale_with_yarn(folder)
    return Reference(folder, min_pixels=PIXELS[0], max_pixels=PIXELS[1]).redrawn(seed=2)


@pytest.fixture(scope="module")
def pools(reference: Reference, image_paths: tuple[str, ...]) -> Iterator[dict[str, RolloutPool]]:
    """One pool of one server per transport; started side by side."""
    servers = {
        name: VllmServer(
            section,
            model_path=reference.folder,
            log_path=reference.folder / f"server-{name}.log",
            served_name=SERVED_NAME,
            weight_transfer=name,
            media_root=Path(image_paths[0]).parent,
            pixels=PIXELS,
        )
        for name, section in SECTIONS.items()
    }
    start_servers(servers.values())
    assert servers["gloo"].pid is not None
    shared = shared_memory_of(servers["gloo"].pid)
    assert shared, "tensor-parallel workers talk through shared memory"
    pools = {
        name: RolloutPool(
            section,
            tokenizer=reference.tokenizer,
            banned_ids=banned_token_ids(reference.folder),
            servers=[servers[name]],
            transport=build_transport(section),
            sleep_level=SLEEP_LEVELS[name],
        )
        for name, section in SECTIONS.items()
    }
    yield pools
    servers["gloo"].stop(grace_s=0.0)  # killed, and still nothing is left behind
    for pool in pools.values():
        pool.close()
    assert not [path for path in shared if path.exists()]


@pytest.fixture(scope="module")
def prompts(reference: Reference, image_paths: tuple[str, ...]) -> list[Prompt]:
    return [reference.prompt(f"{i}", "Which digit?", image_paths[i % 3]) for i in range(6)]


def says(pool: RolloutPool, route: str) -> object:
    (member,) = pool.group.members
    with open_client(timeout_s=PATIENCE_S) as client:
        return call(client, "GET", f"{member.url}{route}", token=member.bearer_token).json()


@pytest.mark.parametrize("name", SECTIONS)
class TestTransport:
    def test_pushed_weights_are_served(
        self, name: str, pools: dict[str, RolloutPool], reference: Reference, prompts: list[Prompt]
    ) -> None:
        pool = pools[name]
        pool.generate(prompts, SAMPLING, seed=0)  # fills the caches
        for version in (3, 4):  # the second push uses the connection of the first
            reference.redrawn(seed=version)
            pool.sleep()
            assert says(pool, "/is_sleeping") == {"is_sleeping": name == "ipc"}
            pool.push_weights(*reference.weights(), version=version)
            result = pool.generate(prompts, SAMPLING, seed=0)
            assert says(pool, "/is_sleeping") == {"is_sleeping": False}
            assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {version}
            assert max(map(reference.error, result.rollouts)) < 1e-4

    def test_a_part_of_a_fused_layer_is_refused_and_repaired(
        self, name: str, pools: dict[str, RolloutPool], reference: Reference, prompts: list[Prompt]
    ) -> None:
        pool = pools[name]
        with pytest.raises(WeightPushError, match=r"only a part of the weights of .*qkv_proj came"):
            pool.push_weights(*reference.weights(FUSED_PART), version=5)
        assert says(pool, "/is_paused") == {"is_paused": True}
        pool.push_weights(*reference.redrawn(seed=9).weights(), version=6)
        result = pool.generate(prompts, SAMPLING, seed=0)
        assert max(map(reference.error, result.rollouts)) < 1e-4
        assert pool.status()[0].restarts == 0


def mislead(monkeypatch: pytest.MonkeyPatch, worker: int, tensor: int) -> None:
    """From now on one worker is told another name for one tensor than its peers: it cannot load it, and they can.

    vLLM takes a list of messages, one per worker.
    """
    original = ControlPlane.start

    def start(self: ControlPlane, path: str, bodies: Any = None, **options: Any) -> Any:
        if path == "/update_weights" and all(body["update_info"]["update"] for body in bodies.values()):
            messages = {target: [deepcopy(body["update_info"]) for _ in range(2)] for target, body in bodies.items()}
            for per_worker in messages.values():
                tensors = per_worker[worker]["update"]["tensors"]
                tensors[tensor] = ("model.language_model.layers.0.no_such.weight", *tensors[tensor][1:])
            bodies = {target: {"update_info": per_worker} for target, per_worker in messages.items()}
        return original(self, path, bodies, **options)

    monkeypatch.setattr(ControlPlane, "start", start)


# The first is heard before its peer, which vLLM does not ask then; the last fails when its peer has everything.
@pytest.mark.parametrize(("worker", "tensor", "version"), [(0, 20, 10), (1, 20, 20), (1, -1, 30)])
def test_one_worker_fails_alone(
    worker: int, tensor: int, version: int, pools: dict[str, RolloutPool], reference: Reference, prompts: list[Prompt]
) -> None:
    """Its peer has new weights, it has not: the server answers nothing until a push has reached both."""
    pool = pools["gloo"]
    (member,) = pool.group.members
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        mislead(patch, worker, tensor)
        with pytest.raises(WeightPushError, match=r"the servers stay paused.*no_such"):
            pool.push_weights(*reference.redrawn(seed=version).weights(), version=version)
    assert time.monotonic() - started < SECTIONS["gloo"].push_timeout_s / 2, "nobody waits for who has failed"
    assert says(pool, "/is_paused") == {"is_paused": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{member.url}/v1/completions",
            json={"model": SERVED_NAME, "prompt": "Which digit?", "max_tokens": 1},
            headers=bearer(member.bearer_token),
            timeout=httpx.Timeout(PATIENCE_S, read=1.0),
        )
    pool.push_weights(*reference.redrawn(seed=version + 1).weights(), version=version + 1)
    result = pool.generate(prompts, SAMPLING, seed=0)
    print(f"accounting: {result.accounting}")
    assert result.accounting.answered == len(prompts)
    assert {span.version for rollout in result.rollouts for span in rollout.weight_spans} == {version + 1}
    assert max(map(reference.error, result.rollouts)) < 1e-4
    assert pool.status()[0].restarts == 0


def test_what_workers_do_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sides that no server takes here: their own memory, one bucket ahead, no repacking, copies that are kept."""
    from megatron_r1reward.weight_sync import vllm_worker

    gpu = torch.device("cuda", 0)
    receiver = object.__new__(vllm_worker.GroupReceiver)
    receiver.device, receiver.model = gpu, torch.nn.Linear(1, 1)
    receiver.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)  # type: ignore[assignment]

    joined: list[Any] = []
    monkeypatch.setattr(vllm_worker.Inlet, "join", lambda *arguments: joined.append(arguments))
    receiver.init_transfer_engine(SimpleNamespace(rank_offset=3))  # type: ignore[arg-type]
    assert joined[0][1:] == (3, gpu)

    monkeypatch.setattr(vllm_worker, "initialize_layerwise_reload", lambda _: None)
    monkeypatch.setattr(vllm_worker, "_take_expert_kernels", lambda _: pytest.fail("a GPU packs no experts"))
    receiver.start_weight_update()

    class Inlet:
        asked = 0

        def receive(self, bucket: object) -> torch.Tensor:
            self.asked += 1
            return torch.zeros(0)

    monkeypatch.setattr(vllm_worker, "checksums", lambda bucket, flat: flat)
    inlet = Inlet()
    coming = receiver._incoming(inlet, ["bucket"] * 5)  # type: ignore[arg-type]
    next(coming)
    assert inlet.asked <= 2, "there is room for one more bucket"
    coming.close()

    kept: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the loader's")
    flat = SimpleNamespace(is_cuda=True, device=gpu, record_stream=kept.append, clone=lambda: flat)
    receiver.model = SimpleNamespace(load_weights=lambda tensors: None)  # type: ignore[assignment]
    receiver._load(SimpleNamespace(tensors=lambda _: ()), flat)  # type: ignore[arg-type]
    assert kept == ["the loader's"]

    shared = object.__new__(vllm_worker.SharedReceiver)
    loaded: list[Any] = []
    copy = SimpleNamespace()
    staged = SimpleNamespace(is_cuda=True, clone=lambda: copy)
    shared._shared = type("Staging", (), {"__getitem__": lambda self, _: staged})()
    monkeypatch.setattr(vllm_worker, "verify", lambda *_: None)
    monkeypatch.setattr(shared, "_load", lambda bucket, flat: loaded.append(flat))
    bucket = SimpleNamespace(num_bytes=1, metas=())
    update = SimpleNamespace(buckets=lambda: [bucket])
    shared._receive(update, SimpleNamespace(offset=0, checksums=[]))  # type: ignore[arg-type]
    assert loaded == [copy], "the sender overwrites its staging buffer"
