"""One receiving end of a plain gloo broadcast, as a program of its own: `gloo_receiver.py JSON`."""

from __future__ import annotations

import json
import sys

import torch

from megatron_r1reward.weight_sync.broadcast_group import BroadcastGroup, Rendezvous


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    group = BroadcastGroup.join(Rendezvous(**given["meeting"]), given["rank"])
    buckets = torch.zeros(sum(given["sizes"]), dtype=torch.uint8).split(given["sizes"])
    for _ in range(given["rounds"]):
        for bucket in buckets:
            group.broadcast(bucket)


if __name__ == "__main__":
    main()
