"""Workers on one machine share what one of them receives; each checks that it has what the sender has sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from waiting import wait_until

from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync import WeightPushError, broadcast_group
from megatron_r1reward.weight_sync.broadcast_group import BroadcastGroup, Inlet, Rendezvous, listen, open_sender
from megatron_r1reward.weight_sync.buckets import Bucket, Packer, WeightUpdate, checksums

TIMEOUT_S = 300.0


@dataclass(kw_only=True)
class Wire:
    """A sender and three workers."""

    store: dist.TCPStore
    sender: BroadcastGroup
    inlets: list[Inlet]
    threads: ThreadPoolExecutor

    def send(self, tensors: dict[str, torch.Tensor]) -> list[Future[dict[str, torch.Tensor]]]:
        """One update; what each worker gets."""
        metas = [TensorMeta.of(name, tensor) for name, tensor in tensors.items()]
        buckets = WeightUpdate.of(metas, 40).buckets()
        got = [self.threads.submit(receive, inlet, buckets) for inlet in self.inlets]
        packer = Packer(iter(tensors.items()))
        for bucket in buckets:
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            packer.fill(bucket, flat)
            self.sender.broadcast(flat)
        self.sender.broadcast(torch.cat(packer.sums))
        return got


def receive(inlet: Inlet, buckets: list[Bucket]) -> dict[str, torch.Tensor]:
    inlet.begin(buckets[-1].start + buckets[-1].num_bytes)
    parts = [(bucket, inlet.receive(bucket)) for bucket in buckets]
    counted = torch.cat([checksums(bucket, flat) for bucket, flat in parts])
    assert torch.equal(inlet.checksums(len(counted)), counted)
    return {name: tensor for bucket, flat in parts for name, tensor in bucket.tensors(flat)}


@pytest.fixture
def connect() -> Iterator[Callable[..., Wire]]:
    with ThreadPoolExecutor(4) as threads:
        opened: list[Wire] = []

        def make(*, once_per_host: bool = True) -> Wire:
            store = listen("127.0.0.1", TIMEOUT_S)
            meeting = Rendezvous(
                backend="gloo", host="127.0.0.1", port=store.port, rank_offset=1, world_size=4, timeout_s=TIMEOUT_S,
                once_per_host=once_per_host,
            )  # fmt: skip
            joining = [threads.submit(Inlet.join, meeting, rank, torch.device("cpu")) for rank in (1, 2, 3)]
            sender = open_sender(store, meeting)
            inlets = [future.result(TIMEOUT_S) for future in joining]
            opened.append(Wire(store=store, sender=sender, inlets=inlets, threads=threads))
            return opened[-1]

        yield make
        for wire in opened:
            wire.sender.close()
            for inlet in wire.inlets:
                inlet.close()


def tensors(seed: int, *sizes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"t{index}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}


def in_group(wire: Wire) -> list[int]:
    return [rank for rank, inlet in enumerate(wire.inlets, 1) if inlet._group is not None]


@pytest.mark.parametrize("once_per_host", [True, False])
def test_everybody_gets_every_update(connect: Callable[..., Wire], once_per_host: bool) -> None:
    wire = connect(once_per_host=once_per_host)
    assert in_group(wire) == ([1] if once_per_host else [1, 2, 3])
    for seed, sizes in enumerate([(3, 20, 1), (3, 20, 1), (50, 2)]):  # at last of another size, as a part would be
        sent = tensors(seed, *sizes)
        for future in wire.send(sent):
            torch.testing.assert_close(future.result(TIMEOUT_S), sent, rtol=0, atol=0)


def test_it_is_one_copy(connect: Callable[..., Wire]) -> None:
    wire = connect()
    first, *others = (future.result(TIMEOUT_S) for future in wire.send(tensors(0, 8)))
    first["t0"].fill_(7.0)
    assert all(bool((other["t0"] == 7.0).all()) for other in others)


def test_nothing_gathers_in_the_store(connect: Callable[..., Wire]) -> None:
    wire = connect()
    keys = []
    for seed in range(4):
        for future in wire.send(tensors(seed, 30, 30)):
            future.result(TIMEOUT_S)
        keys.append(wire.store.num_keys())
    assert len(set(keys)) == 1


def test_each_machine_has_one_that_receives(connect: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(["red", "green", "red", "green"])
    monkeypatch.setattr(broadcast_group, "this_machine", lambda: next(machines))
    wire = connect()
    assert len(in_group(wire)) == 2
    sent = tensors(0, 5, 70)
    for future in wire.send(sent):
        torch.testing.assert_close(future.result(TIMEOUT_S), sent, rtol=0, atol=0)


def test_who_waits_is_set_free_when_the_sender_leaves(connect: Callable[..., Wire]) -> None:
    """Also when the worker that receives for it hangs, and would never tell it."""
    wire = connect()
    bucket = WeightUpdate.of([TensorMeta.of("t", torch.zeros(4))], 40).buckets()[0]
    hung, waiting = wire.inlets[:2]
    hung.begin(bucket.num_bytes)
    waiting.begin(bucket.num_bytes)
    received: Future[Any] = wire.threads.submit(waiting.receive, bucket)
    del wire.store  # as in the transport, where only the group keeps it
    assert not received.done()
    wire.sender.close()
    wait_until(received.done, seconds=TIMEOUT_S / 2)
    with pytest.raises(RuntimeError):
        received.result()


def test_memory_that_cannot_be_opened(connect: Callable[..., Wire]) -> None:
    wire = connect()
    wire.inlets[0].begin(64)
    wire.inlets[0]._file.close()  # type: ignore[union-attr]
    with pytest.raises(WeightPushError, match=r"turn rollout\.weights_once_per_host off"):
        wire.inlets[1].begin(64)
