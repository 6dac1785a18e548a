"""The compiled kernels on a CUDA device against float64 autograd, and compute-sanitizer's race check."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import OPTIONS, TEMPERATURES, make_case, relative, truth

from megatron_r1reward.kernels.policy_loss import cuda_cluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# The test process holds interpreted kernels (conftest): compiled ones live in a process of their own.
WORKER = Path(__file__).with_name("policy_loss_worker.py")


def worker(*arguments: str, prefix: tuple[str, ...] = ()) -> str:
    command = [*prefix, sys.executable, str(WORKER), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("implementation", ["torch", "triton", "triton_row", "cuda_cluster"])
@pytest.mark.parametrize("name", ["paper", "everything", "dual_clip"])
def test_matches_float64(name: str, implementation: str, tmp_path: Path) -> None:
    if implementation == "cuda_cluster":
        if not cuda_cluster.path().exists():
            pytest.skip(f"needs the CUDA kernel: {cuda_cluster.HOW_TO_BUILD}")
        if name == "everything":
            pytest.skip("the cluster kernel has no KL and entropy terms")
    file = tmp_path / "result.pt"
    worker(implementation, name, str(file))
    got = torch.load(file)
    temperature = TEMPERATURES.get(name, 1.0)
    logits, inputs = make_case(40, 151_936, temperature=temperature, dtype=torch.bfloat16)
    expected = truth(logits, inputs, OPTIONS[name], temperature=temperature)
    carries = inputs.weights != 0
    assert relative(got["log_probs"][carries], expected.log_probs[carries]) < 2e-6
    assert relative(got["loss"], expected.loss) < 2e-5
    assert relative(got["gradient"], expected.gradient) < 2.5e-3
    assert torch.equal(got["flags"], expected.flags)


@pytest.mark.parametrize("implementation", ["triton_row", "cuda_cluster"])
def test_no_race_in_shared_memory(implementation: str, tmp_path: Path) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    if implementation == "cuda_cluster" and not cuda_cluster.path().exists():
        pytest.skip(f"needs the CUDA kernel: {cuda_cluster.HOW_TO_BUILD}")
    prefix = ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9")
    output = worker(implementation, "paper", str(tmp_path / "result.pt"), "32768", prefix=prefix)
    assert "0 hazards" in output
