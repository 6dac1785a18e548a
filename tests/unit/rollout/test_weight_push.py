"""Buckets, the order of a push, and the gloo transport without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from fake_vllm import FakeVllm
from megatron_r1reward.rollout.gloo_wire import GlooGroup, GlooRendezvous, GlooUpdate, listen

from megatron_r1reward.rollout.weights import TensorMeta, WeightPusher, WeightPushError, bucketize
from megatron_r1reward.rollout.weights_gloo import _pack

torch.set_num_threads(1)


def named_tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


def metas_of(tensors: dict[str, torch.Tensor]) -> list[TensorMeta]:
    return [TensorMeta.of(name, tensor) for name, tensor in tensors.items()]


def test_buckets_keep_the_order_and_the_limit() -> None:
    metas = metas_of(named_tensors((10,), (5, 2), (), (100,), (3,), (0,)))
    buckets = list(bucketize(metas, limit_bytes=80))
    assert [meta for bucket in buckets for meta in bucket] == metas
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 2]  # the large one alone, above the limit
    assert all(sum(meta.num_bytes for meta in bucket) <= 80 for bucket in buckets if len(bucket) > 1)


def test_a_bucket_has_one_dtype() -> None:
    metas = metas_of(named_tensors((4,), (4,))) + metas_of(named_tensors((4,), dtype=torch.bfloat16))
    assert [bucket[0].dtype for bucket in bucketize(metas)] == ["float32", "bfloat16"]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="'fp7' is not a torch dtype"):
        _ = TensorMeta(name="w", dtype="fp7", shape=(1,)).num_bytes


def test_the_stream_must_be_what_was_announced() -> None:
    tensors = named_tensors((2,), (3,))
    update = GlooUpdate.of(metas_of(tensors), bucket_bytes=8)
    with pytest.raises(WeightPushError, match="end before t1"):
        list(_pack(update, [("t0", tensors["t0"])]))
    with pytest.raises(WeightPushError, match="same order, same shapes"):
        list(_pack(update, reversed(tensors.items())))
    with pytest.raises(WeightPushError, match="t2 comes after the last"):
        list(_pack(update, [*tensors.items(), ("t2", torch.zeros(1))]))


def test_tensors_are_asked_for_bucket_by_bucket() -> None:
    tensors = named_tensors((4,), (4,), (4,))
    asked: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    stream = _pack(GlooUpdate.of(metas_of(tensors), bucket_bytes=16), gather())
    next(stream)
    assert asked == ["t0"]


def test_gloo_delivers_to_all_receivers() -> None:
    tensors = named_tensors((7, 3), (5,), ()) | {"half": torch.randn(6).bfloat16()}
    update = GlooUpdate.of(metas_of(tensors), bucket_bytes=64)
    store = listen("127.0.0.1", 20)
    meeting = GlooRendezvous(host="127.0.0.1", port=store.port, rank_offset=0, world_size=3, timeout_s=20)

    def receive(rank: int) -> dict[str, torch.Tensor]:
        group = GlooGroup.join(replace(meeting, rank_offset=rank), rank)
        received = {}
        for bucket in update.buckets():
            flat = torch.empty(sum(meta.numel for meta in bucket), dtype=bucket[0].torch_dtype)
            group.broadcast(flat)
            for meta, part in zip(bucket, flat.split([meta.numel for meta in bucket]), strict=True):
                received[meta.name] = part.view(meta.shape)
        return received

    with ThreadPoolExecutor(2) as threads:
        receivers = [threads.submit(receive, rank) for rank in (1, 2)]
        sender = GlooGroup(store, meeting, 0)
        for flat in _pack(update, tensors.items()):
            sender.broadcast(flat)
        for receiver in receivers:
            torch.testing.assert_close(receiver.result(), tensors, rtol=0, atol=0)


class Silent(WeightPusher):
    """A transport that carries nothing, to see the steps around it."""

    def _connect(self) -> None:
        pass

    def _transfer(self, metas: object, tensors: object) -> None:
        pass

    def _disconnect(self) -> None:
        pass


def test_a_push_pauses_first_and_resumes_last(fake_vllm: Callable[[], FakeVllm]) -> None:
    fakes = [fake_vllm(), fake_vllm()]
    pusher = Silent([fake.url for fake in fakes])
    pusher.push([], [], version=4)
    pusher.close()
    for fake in fakes:
        assert fake.calls == [
            "POST /pause?mode=keep&clear_cache=true",
            "POST /start_weight_update",
            "POST /finish_weight_update",
            "GET /weight_info",
            "POST /resume",
        ]
        assert fake.version == "4"


@pytest.mark.parametrize("route", ["/pause", "/start_weight_update", "/finish_weight_update", "/weight_info"])
def test_after_a_failure_nobody_is_resumed(fake_vllm: Callable[[], FakeVllm], route: str) -> None:
    good, bad = fake_vllm(), fake_vllm()
    bad.refused.add(route)
    pusher = Silent([good.url, bad.url])
    with pytest.raises(WeightPushError, match=f"{bad.url}{route} answered 500"):
        pusher.push([], [], version=1)
    bad.refused.clear()
    with pytest.raises(WeightPushError, match="restart the servers"):
        pusher.push([], [], version=2)
    pusher.close()
    assert not any("/resume" in call for call in good.calls + bad.calls)
