"""Every kernel compiles for sm_90 without a GPU, with no register spilled."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1reward.kernels.policy_loss import cuda_cluster

ROOT = Path(__file__).parents[3]
TRITON_36 = ROOT / "build" / "triton-3.6.0"


def compile_all(front: Path | None, cache: Path) -> dict[str, object]:
    """The report of compile_sm90.py, run with another Triton in front when there is one."""
    path = os.pathsep.join(str(p) for p in (front, ROOT) if p is not None)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_sm90.py"
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def assert_no_spills(report: dict[str, object]) -> None:
    for name, numbers in report["kernels"].items():
        spilled = {key: numbers[key] for key in ("stack", "local", "spills") if numbers[key]}
        assert not spilled, f"{name} spills on triton {report['triton']}: {numbers}"
        # 65,536 registers of an SM for 16 warps (512 threads) leave 128 each.
        assert numbers["registers"] <= 128, (name, numbers)
        if not name.startswith("loss"):
            assert numbers["wide_loads"] > 0, f"{name} does not load 16 bytes at a time: {numbers}"


@pytest.mark.slow
def test_triton_kernels_on_the_installed_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = compile_all(None, tmp_path)
    assert len(report["kernels"]) == 12
    assert_no_spills(report)


@pytest.mark.slow
def test_triton_kernels_on_triton_3_6(tmp_path: Path) -> None:
    if not TRITON_36.exists():
        pytest.skip(f"needs triton 3.6: pip install --no-deps --target {TRITON_36.relative_to(ROOT)} triton==3.6.0")
    report = compile_all(TRITON_36, tmp_path)
    assert report["triton"].startswith("3.6")
    assert_no_spills(report)


@pytest.mark.slow
def test_cuda_kernel_builds_and_keeps_its_registers(tmp_path: Path) -> None:
    """nvcc for sm_90a; the shared object loads without a driver and takes the structure that ctypes builds."""
    if cuda_cluster.find_nvcc() is None:
        pytest.skip(f"needs nvcc: {cuda_cluster.HOW_TO_GET_NVCC}")
    library = tmp_path / "row_cluster.so"
    report = cuda_cluster.build(library)
    assert "sm_90a" in report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills
    assert all(numbers == ("0", "0", "0") for numbers in spills), report
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 128
    handle = cuda_cluster.load(library)
    assert handle.row_cluster_arguments_size() == ctypes.sizeof(cuda_cluster.Arguments)


def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="no such architecture"):
        cuda_cluster.build(tmp_path / "out.so")
    assert list(tmp_path.iterdir()) == [broken.parent]
