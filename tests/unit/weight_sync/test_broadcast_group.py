"""The group that weights travel in meets on the loopback address and on the name of a host."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from megatron_r1reward.weight_sync import senders
from megatron_r1reward.weight_sync.broadcast_group import BroadcastGroup, Rendezvous, listen

TIMEOUT_S = 30.0  # of a receiver that does not notice by itself
LONG_S = 300.0  # of everybody else


def host_name() -> str:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        pytest.skip("this machine's own name cannot be resolved")
    return socket.gethostname()


@pytest.mark.parametrize("on_the_network", [False, True], ids=["loopback", "host-name"])
def test_a_tensor_arrives(on_the_network: bool) -> None:
    host = host_name() if on_the_network else "127.0.0.1"
    store = listen(host, LONG_S)
    meeting = Rendezvous(backend="gloo", host=host, port=store.port, rank_offset=1, world_size=2, timeout_s=LONG_S)

    def receive() -> torch.Tensor:
        tensor = torch.zeros(5)
        BroadcastGroup.join(meeting, 1).broadcast(tensor)
        return tensor

    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receive)
        BroadcastGroup(store, meeting, 0).broadcast(torch.arange(5.0))
        assert torch.equal(received.result(LONG_S), torch.arange(5.0))


def test_the_sender_notices_who_leaves_long_before_the_time_out() -> None:
    """By the sender, and through it by the others: nearly always at once, at the time-out at the latest."""
    store = listen("127.0.0.1", LONG_S)
    meeting = Rendezvous(
        backend="gloo", host="127.0.0.1", port=store.port, rank_offset=0, world_size=3, timeout_s=LONG_S
    )

    def broadcasts(group: BroadcastGroup, count: int) -> None:
        try:
            for _ in range(count):
                group.broadcast(torch.ones(1 << 20))
        finally:
            group.close()

    def receive(rank: int, count: int, timeout_s: float) -> None:
        broadcasts(BroadcastGroup.join(replace(meeting, rank_offset=rank, timeout_s=timeout_s), rank), count)

    with ThreadPoolExecutor(2) as pool:
        leaving, staying = pool.submit(receive, 1, 2, LONG_S), pool.submit(receive, 2, 100, TIMEOUT_S)
        sender = BroadcastGroup(store, meeting, 0)
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            broadcasts(sender, 100)
        assert time.monotonic() - started < LONG_S / 2
        leaving.result(LONG_S)
        with pytest.raises(RuntimeError):
            staying.result(LONG_S)


def test_the_end_of_the_process_does_not_wait_for_a_peer() -> None:
    """A peer that never joins leaves nccl in its start, in a thread that nobody can end."""
    never = threading.Event()
    waiting = senders._in_thread(never.wait)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "weights")
    assert thread.daemon
    never.set()
    assert waiting.result(LONG_S)
