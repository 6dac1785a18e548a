"""policy_loss_worker.py IMPLEMENTATION OPTIONS FILE [COLUMNS]: one loss on the GPU, results into FILE."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from kernel_cases import OPTIONS, make_case

from megatron_r1reward.kernels.policy_loss.from_logits import policy_loss_from_logits
from megatron_r1reward.kernels.policy_loss.options import TokenInputs


def main(implementation: str, name: str, file: str, columns: str = "151936") -> None:
    logits, inputs = make_case(40, int(columns), OPTIONS[name], dtype=torch.bfloat16)
    moved = {key: None if value is None else value.cuda() for key, value in vars(inputs).items()}
    leaf = logits.cuda().requires_grad_()
    output = policy_loss_from_logits(
        leaf.view(leaf.shape), TokenInputs(**moved), OPTIONS[name], implementation=implementation
    )
    (gradient,) = torch.autograd.grad(output.total, leaf)
    results = {"log_probs": output.log_probs, "loss": output.loss, "flags": output.flags, "gradient": gradient}
    torch.save({key: value.detach().cpu() for key, value in results.items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
