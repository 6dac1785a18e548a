"""Compile every Triton kernel for sm_90 as it is launched, no GPU needed; print registers and spills as JSON.

A program of its own, because kernels decorated for the interpreter cannot be compiled, and because another Triton can
be put in front: PYTHONPATH=build/triton-3.6.0:. python tests/unit/kernels/compile_sm90.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_r1reward.kernels.policy_loss.triton_gradient import gradient_kernel
from megatron_r1reward.kernels.policy_loss.triton_loss import loss_kernel
from megatron_r1reward.kernels.policy_loss.triton_row import row_kernel
from megatron_r1reward.kernels.policy_loss.triton_softmax import statistics_kernel

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "targets_ptr": "*i64",
    "flags_ptr": "*i32",
    "has_gradient_ptr": "*i8",
}
INTEGERS = {"row_stride": "i64", "columns": "i32", "padded_columns": "i32"}
INTEGERS |= {"first_column": "i32", "rows": "i32", "ranks": "i32"}
ALIGNED = ("row_stride", "columns", "padded_columns", "rows")
EVERYTHING = {"KL": 3, "IMPORTANCE": True}


def signature(kernel: Any, constants: dict[str, Any], logits: str) -> tuple[dict[str, str], dict[Any, Any]]:
    """(type of each argument, alignment hints): pointers and sizes divisible by 16, as in training."""
    types: dict[str, str] = {}
    hints: dict[Any, Any] = {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name in ("logits_ptr",):
            types[name] = f"*{logits}"
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        else:
            types[name] = INTEGERS.get(name, "fp32")
        if name.endswith("_ptr") or name in ALIGNED:
            hints[(number,)] = [["tt.divisibility", 16]]
    return types, hints


def cases() -> Iterator[tuple[str, Any, dict[str, Any], int, str]]:
    """(name, kernel, compile-time arguments, warps, dtype of the logits), as `triton_rows` launches them."""
    for logits in ("bf16", "fp32"):
        for entropy in (False, True):
            tile = {"BLOCK": 8192, "ENTROPY": entropy}
            yield f"gradient {logits} entropy={entropy}", gradient_kernel, tile, 8, logits
            row = {**EVERYTHING, "ENTROPY": entropy, "BLOCK": 16384}
            yield f"row {logits} entropy={entropy}", row_kernel, row, 16, logits
        yield f"statistics {logits}", statistics_kernel, {"BLOCK": 8192}, 8, logits
    yield "loss", loss_kernel, {**EVERYTHING, "BLOCK": 128}, 4, "bf16"
    plain = {"KL": 0, "IMPORTANCE": False, "BLOCK": 128}
    yield "loss, paper's options", loss_kernel, plain, 4, "bf16"


def measure(kernel: Any, constants: dict[str, Any], warps: int, logits: str) -> dict[str, int]:
    """Registers per thread, bytes of stack and local memory, shared memory, and spill instructions in the code."""
    types, hints = signature(kernel, constants, logits)
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=positions, attrs=hints)
    compiled = triton.compile(source, target=TARGET, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    registers, stack, _, local = map(int, numbers.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": int(compiled.metadata.shared),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"LDG[.A-Z0-9]*\.128", code)),
    }


def main() -> None:
    report: dict[str, Any] = {"triton": triton.__version__, "kernels": {}}
    for name, kernel, constants, warps, logits in cases():
        report["kernels"][name] = measure(kernel, constants, warps, logits)
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
