"""policy_loss_worker.py IMPLEMENTATION OPTIONS FILE [COLUMNS]: one loss on the GPU, results into FILE."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from kernel_cases import OPTIONS, TEMPERATURES, make_case, on_device, run_chunk


def main(implementation: str, name: str, file: str, columns: str = "151936") -> None:
    temperature = TEMPERATURES.get(name, 1.0)
    logits, inputs = make_case(40, int(columns), temperature=temperature, dtype=torch.bfloat16)
    got = run_chunk(implementation, logits.cuda(), on_device(inputs, "cuda"), OPTIONS[name], temperature=temperature)
    torch.save({key: value.cpu() for key, value in vars(got).items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
