"""Optional build of the CUDA kernel: `python -m megatron_r1reward.kernels.build [output.so]`.

Needs nvcc 12.4 or later (CUDA toolkit, or the wheels of the extra `kernels-build`) and a C++ compiler; no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_r1reward.kernels import cuda_library

HOW = "install a CUDA toolkit (set CUDA_HOME), or pip install 'megatron-r1reward[kernels-build]'"


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of the PATH, or of NVIDIA's wheels; None: there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or []) if package else []:
        candidates += sorted(Path(root).glob("*/bin/nvcc"), reverse=True)
    return next((path for path in candidates if path.exists()), None)


def command(nvcc: Path, output: Path) -> list[str]:
    """The compiler call; ptxas reports registers and spills on stderr."""
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "--shared"]
    wheel_root = nvcc.parent.parent
    if (wheel_root / "include" / "cuda_runtime.h").exists() and (wheel_root / "lib").exists():
        flags += [f"-I{wheel_root / 'include'}", f"-L{wheel_root / 'lib'}"]
    return [str(nvcc), *flags, "-Xcompiler", "-fPIC", "-o", str(output), str(cuda_library.SOURCE)]


def build(output: Path | None = None) -> str:
    """Compile into `output` (default: where `cuda_library` looks for it); returns the compiler's report.

    Raises:
        ValueError: no compiler, or it failed; the message holds the reason.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise ValueError(f"nvcc is missing: {HOW}")
    target = output or cuda_library.path()
    temporary = target.with_suffix(f".{os.getpid()}.so")
    result = subprocess.run(command(nvcc, temporary), capture_output=True, text=True, check=False)
    if result.returncode:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{' '.join(command(nvcc, target))} failed:\n{result.stderr}")
    temporary.replace(target)
    return result.stderr


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
