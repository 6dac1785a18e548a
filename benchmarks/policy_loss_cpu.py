"""The LM head and the loss on a CPU: one variant per fresh process, so that none inherits another's memory."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_r1reward.algorithm.policy_loss import policy_loss
from megatron_r1reward.config.schema import AlgorithmSection
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions, TokenInputs

SEQUENCE = 256  # tokens per sequence: Liger's loss has one advantage per sequence


@dataclass(frozen=True, kw_only=True)
class Size:
    tokens: int = 4096
    vocabulary: int = 32_768
    hidden: int = 512
    active: float = 0.25  # share of rows that carry a loss: the last tokens of each sequence


@dataclass(frozen=True, kw_only=True)
class Batch:
    hidden: torch.Tensor  # [R, H]
    weight: torch.Tensor  # [V, H]
    inputs: TokenInputs


def make_batch(size: Size) -> Batch:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, generator=generator)
    weight = torch.randn(size.vocabulary, size.hidden, generator=generator).mul_(size.hidden**-0.5)
    sequences = size.tokens // SEQUENCE
    carries = (torch.arange(SEQUENCE) >= SEQUENCE - round(SEQUENCE * size.active)).repeat(sequences)
    advantages = torch.randn(sequences, generator=generator).repeat_interleave(SEQUENCE)
    inputs = TokenInputs(
        targets=torch.randint(0, size.vocabulary, (size.tokens,), generator=generator),
        old_log_probs=torch.full((size.tokens,), -11.0) + 0.3 * torch.randn(size.tokens, generator=generator),
        advantages=advantages,
        weights=carries.float() / float(carries.sum()),
    )
    return Batch(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), inputs=inputs)


def naive(batch: Batch) -> torch.Tensor:
    """Plain torch over all rows: logits, log-softmax, the loss."""
    inputs = batch.inputs
    log_p_RV = (batch.hidden @ batch.weight.t()).log_softmax(-1)
    log_probs_R = log_p_RV.gather(1, inputs.targets[:, None]).squeeze(1)
    result = policy_loss(log_probs_R, inputs.old_log_probs, inputs.advantages, AlgorithmSection())
    return (result.per_token_loss * inputs.weights).sum()


def fused(batch: Batch) -> torch.Tensor:
    """linear_policy_loss: active rows only, gradients formed in the forward."""
    return linear_policy_loss(batch.hidden, batch.weight, batch.inputs, PolicyLossOptions()).total


def recompute(batch: Batch) -> torch.Tensor:
    """linear_log_probs on the active rows, the loss in plain torch, logits recomputed in the backward."""
    rows = (batch.inputs.weights != 0).nonzero().squeeze(1)
    inputs = batch.inputs.take(rows)
    log_probs_R, _ = linear_log_probs(batch.hidden[rows], batch.weight, inputs.targets)
    result = policy_loss(log_probs_R, inputs.old_log_probs, inputs.advantages, AlgorithmSection())
    return (result.per_token_loss * inputs.weights).sum()


def liger(batch: Batch) -> torch.Tensor:
    """Liger's chunked loss, one sequence per chunk, not compiled; all rows, no Pre-CLIP."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    inputs = batch.inputs
    return function(
        batch.hidden.view(-1, SEQUENCE, batch.hidden.shape[1]),
        batch.weight,
        inputs.targets.view(-1, SEQUENCE),
        (inputs.weights != 0).view(-1, SEQUENCE).long(),
        inputs.advantages.view(-1, SEQUENCE)[:, 0],
        old_per_token_logps=inputs.old_log_probs.view(-1, SEQUENCE),
    )[0]


VARIANTS: dict[str, Callable[[Batch], torch.Tensor]] = {
    "naive torch": naive,
    "fused": fused,
    "recompute": recompute,
    "liger chunked": liger,
}


def _memory_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _backward(variant: Callable[[Batch], torch.Tensor], batch: Batch) -> float:
    batch.hidden.grad = batch.weight.grad = None
    loss = variant(batch)
    loss.backward()
    return float(loss.detach())


def measure(name: str, size: Size, *, repeats: int, folder: Path) -> dict[str, Any]:
    """Runs in a process of its own. Memory first: the peak of the first full-size pass over what was resident before.

    It counts everything that the pass needs, its results (two gradients) included. A small pass before has loaded
    libraries and thread pools.
    """
    variant = VARIANTS[name]
    _backward(variant, make_batch(Size(tokens=SEQUENCE, vocabulary=256, hidden=64)))
    batch = make_batch(size)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak of this process
    before = _memory_bytes("VmRSS")
    loss = _backward(variant, batch)
    peak = max(_memory_bytes("VmHWM"), _memory_bytes("VmRSS"))
    assert batch.hidden.grad is not None and batch.weight.grad is not None
    torch.save([batch.hidden.grad, batch.weight.grad], folder / f"{name}.pt")
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        _backward(variant, batch)
        seconds.append(time.perf_counter() - started)
    return {
        "variant": name,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "extra MB": (peak - before) / 1e6,
        "loss": loss,
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def available() -> list[str]:
    """Variants that can run here."""
    names = list(VARIANTS)
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        print("liger chunked is left out: pip install --no-deps liger-kernel (extra `bench`)")
        names.remove("liger chunked")
    return names


def run(size: Size, *, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Every variant in its own process; ratios and gradient differences to naive torch."""
    rows: list[dict[str, Any]] = []
    script = Path(__file__).with_name("policy_loss.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in available():
            command = [sys.executable, str(script), "--worker", variant, "--folder", name, "--repeats", str(repeats)]
            for key, value in vars(size).items():
                command += [f"--{key}", str(value)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            # Give freed memory back at once: what is measured is need, not the allocator's caches.
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"variant {variant!r} failed:\n{result.stderr[-2000:]}")
            rows.append(json.loads(result.stdout.splitlines()[-1]))
            print(f"# {variant}: {rows[-1]['seconds']:.2f} s, {rows[-1]['extra MB']:.0f} MB", file=sys.stderr)
        reference = torch.load(folder / "naive torch.pt")
        for row in rows:
            gradients = torch.load(folder / f"{row['variant']}.pt")
            differences = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, reference, strict=True)]
            row["gradient difference"] = max(differences)
    base = rows[0]
    for row in rows:
        row["times faster"] = base["seconds"] / row["seconds"]
        row["of naive memory"] = row["extra MB"] / base["extra MB"]
    return rows
