"""Buckets, checksums, the order of a push, what it does when servers fail; transports without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from fake_vllm import FakeVllm, Silent

from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import Target
from megatron_r1reward.weight_sync.broadcast_group import BroadcastGroup, Rendezvous, listen
from megatron_r1reward.weight_sync.buckets import (
    Packer,
    Recording,
    WeightSnapshot,
    WeightUpdate,
    bucketize,
    checksums,
    verify,
)
from megatron_r1reward.weight_sync.protocol import WeightPush
from megatron_r1reward.weight_sync.shared_memory import IPC_ADVICE, open_memory_file

torch.set_num_threads(1)
CPU = torch.device("cpu")
MakeFake = Callable[..., FakeVllm]
STEPS = [
    "POST /pause?mode=keep&clear_cache=true",
    "POST /start_weight_update",
    "POST /finish_weight_update",
    "GET /weight_info",
    "POST /resume",
]


def named_tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def metas_of(tensors: dict[str, torch.Tensor]) -> list[TensorMeta]:
    return [TensorMeta.of(name, tensor) for name, tensor in tensors.items()]


def recording_of(
    tensors: dict[str, torch.Tensor], *, bucket_bytes: int = 64, snapshot: WeightSnapshot | None = None
) -> Recording:
    metas = metas_of(tensors)
    if snapshot is not None:
        return snapshot.record(metas, tensors.items(), version=1, bucket_bytes=bucket_bytes, device=CPU)
    return Recording(WeightUpdate.of(metas, bucket_bytes), tensors.items(), device=CPU, version=1)


def test_buckets_keep_the_order_and_the_limit() -> None:
    metas = metas_of(named_tensors((10,), (5, 2), (), (100,), (3,), (0,)))
    buckets = list(bucketize(metas, limit_bytes=80))
    assert [meta for bucket in buckets for meta in bucket] == metas
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 2]  # the large one alone, above the limit
    assert all(sum(meta.num_bytes for meta in bucket) <= 80 for bucket in buckets if len(bucket) > 1)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="'fp7' is none of"):
        _ = TensorMeta(name="w", dtype="fp7", shape=(1,)).num_bytes


def test_the_stream_must_be_what_was_announced() -> None:
    tensors = named_tensors((2,), (3,))
    update = WeightUpdate.of(metas_of(tensors), 8)

    def take(*stream: tuple[str, torch.Tensor]) -> None:
        list(Recording(update, stream, device=CPU, version=1))

    with pytest.raises(WeightPushError, match="end before t1"):
        take(("t0", tensors["t0"]))
    with pytest.raises(WeightPushError, match="same order, same shapes"):
        take(*reversed(tensors.items()))
    with pytest.raises(WeightPushError, match="t2 comes after the last"):
        take(*tensors.items(), ("t2", torch.zeros(1)))


def test_tensors_are_asked_for_bucket_by_bucket() -> None:
    tensors = named_tensors((4,), (4,), (4,))
    asked: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    recording = iter(Recording(WeightUpdate.of(metas_of(tensors), 16), gather(), device=CPU, version=1))
    next(recording)
    assert asked == ["t0"]


@pytest.mark.parametrize("damage", ["bit", "lost", "doubled"])
def test_checksums_find_damage(damage: str) -> None:
    tensors = named_tensors((7, 3), (5,), ()) | {"half": torch.randn(6).bfloat16()}
    update = WeightUpdate.of(metas_of(tensors), 1 << 20)
    buckets = update.buckets()
    for bucket in buckets:
        flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        packer = Packer(iter([(meta.name, tensors[meta.name]) for meta in bucket.metas]))
        packer.fill(bucket, flat)
        expected = checksums(bucket, flat)
        verify(bucket.metas, expected, checksums(bucket, flat))
        slot = next(iter(bucket.slots(flat)))
        if damage == "bit":
            slot[1] ^= 4
        elif damage == "lost":
            slot.zero_()
        else:
            slot += slot.clone()
        with pytest.raises(WeightPushError, match=f"1 tensors arrived damaged, the first: {bucket.metas[0].name}"):
            verify(bucket.metas, expected, checksums(bucket, flat))


def test_a_snapshot_replays_what_was_recorded() -> None:
    tensors = named_tensors((7, 3), (5,), ()) | {"half": torch.randn(6).bfloat16()}
    snapshot = WeightSnapshot()
    recording = recording_of(tensors, snapshot=snapshot)
    next(iter(recording))
    assert snapshot.version is None, "half a recording is none"
    recording.drain()
    assert snapshot.version == 1
    replayed = {name: tensor for bucket, flat in snapshot for name, tensor in bucket.tensors(flat)}
    torch.testing.assert_close(replayed, tensors, rtol=0, atol=0)
    torch.testing.assert_close(snapshot.sums(), recording.sums())
    assert snapshot.memory is not None
    seen_by_another = open_memory_file(snapshot.memory.path, snapshot.memory.tensor.numel(), IPC_ADVICE)
    assert torch.equal(seen_by_another, snapshot.memory.tensor)
    path = snapshot.memory.path
    snapshot.close()
    with pytest.raises(WeightPushError, match="on the trainer's machine"):
        open_memory_file(path, 1, IPC_ADVICE)


def test_gloo_delivers_to_all_receivers() -> None:
    tensors = named_tensors((7, 3), (5,), ()) | {"half": torch.randn(6).bfloat16()}
    recording = recording_of(tensors)
    store = listen("127.0.0.1", 120)
    meeting = Rendezvous(backend="gloo", host="127.0.0.1", port=store.port, rank_offset=0, world_size=3, timeout_s=120)

    def receive(rank: int) -> dict[str, torch.Tensor]:
        group = BroadcastGroup.join(replace(meeting, rank_offset=rank), rank)
        received = {}
        for bucket in recording.update.buckets():
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            group.broadcast(flat)
            received |= dict(bucket.tensors(flat))
        return received

    with ThreadPoolExecutor(2) as threads:
        receivers = [threads.submit(receive, rank) for rank in (1, 2)]
        sender = BroadcastGroup(store, meeting, 0)
        for _, flat in recording:
            sender.broadcast(flat)
        for receiver in receivers:
            torch.testing.assert_close(receiver.result(), tensors, rtol=0, atol=0)


def targets_of(*fakes: FakeVllm) -> list[Target]:
    return [Target(name=f"s{i}", url=fake.url) for i, fake in enumerate(fakes)]


@pytest.fixture
def push() -> Iterator[WeightPush]:
    made = WeightPush(Silent(), timeout_s=60, control_timeout_s=60)
    yield made
    made.close()


def test_a_push_pauses_first_and_resumes_last(fake_vllm: MakeFake, push: WeightPush) -> None:
    fakes = [fake_vllm(), fake_vllm()]
    recording = recording_of(named_tensors((3,)))
    assert push.run(targets_of(*fakes), recording.update, recording, version=4) == {}
    for fake in fakes:
        assert fake.calls == STEPS
        assert fake.version == "4"


@pytest.mark.parametrize("route", ["/pause", "/start_weight_update", "/finish_weight_update", "/weight_info"])
def test_who_fails_stays_paused_and_the_others_go_on(fake_vllm: MakeFake, push: WeightPush, route: str) -> None:
    good, bad = fake_vllm(), fake_vllm()
    bad.refused.add(route)
    good_target, bad_target = targets_of(good, bad)
    recording = recording_of(named_tensors((3,)))
    failures = push.run([good_target, bad_target], recording.update, recording, version=1)
    assert list(failures) == [bad_target]
    assert f"{bad.url}{route} answered 500" in failures[bad_target]
    assert "POST /resume" in good.calls
    assert "POST /resume" not in bad.calls


def test_a_server_that_reports_another_version_is_not_resumed(fake_vllm: MakeFake, push: WeightPush) -> None:
    fake = fake_vllm()
    fake.keeps_version = True
    recording = recording_of(named_tensors((3,)))
    (failure,) = push.run(targets_of(fake), recording.update, recording, version=7).values()
    assert "reports weight version 'default' after pushing 7" in failure
    assert "POST /resume" not in fake.calls


def test_a_lost_transport_resumes_nobody(fake_vllm: MakeFake) -> None:
    class Lost(Silent):
        def send(self, control: object, update: object, source: object) -> None:
            raise RuntimeError("Connection closed by peer")

    fakes = [fake_vllm(), fake_vllm()]
    push = WeightPush(Lost(), timeout_s=60, control_timeout_s=60)
    recording = recording_of(named_tensors((3,)))
    failures = push.run(targets_of(*fakes), recording.update, recording, version=1)
    push.close()
    assert all("Connection closed" in reason for reason in failures.values())
    assert len(failures) == 2
    assert not any("/resume" in call for fake in fakes for call in fake.calls)
