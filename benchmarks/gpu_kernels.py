"""The kernels on this device against float64 autograd, every implementation and option; what float32 logits cost.

    python benchmarks/gpu_kernels.py [--json FILE] [--check] [--sanitize] [--dry-run]

`--sanitize` runs the kernels under compute-sanitizer's racecheck and memcheck instead. `--dry-run` goes through the
same on a CPU, Triton interpreted, at a small vocabulary; its times mean nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
if "--dry-run" in sys.argv:
    import interpreted_triton  # noqa: F401  (before anything imports Triton)

import logits_precision  # noqa: E402
import torch  # noqa: E402
from kernel_cases import OPTIONS, TEMPERATURES, make_case, on_device, relative, run_chunk, truth  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

from megatron_r1reward.kernels.choose_kernel import DESCRIPTIONS, refuses, request_for  # noqa: E402
from megatron_r1reward.kernels.lm_head import add_weight_gradient_  # noqa: E402

GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}  # relative to float64, as in tests/unit/kernels


def accuracy(device: torch.device, columns: int) -> list[dict[str, Any]]:
    """One row per implementation, option and dtype of the logits."""
    rows = []
    for name in DESCRIPTIONS:
        for option, dtype in ((o, d) for o in OPTIONS for d in GRADIENT):
            request = request_for(device, dtype=dtype, columns=columns, options=OPTIONS[option])
            refusal = refuses(name, request)
            entry: dict[str, Any] = {"implementation": name, "options": option, "logits": str(dtype)[6:]}
            if refusal is not None:
                rows.append(entry | {"gradient error": None, "log-prob error": None, "ok": None, "note": refusal})
                continue
            temperature = TEMPERATURES.get(option, 1.0)
            logits, inputs = make_case(24, columns, temperature=temperature, dtype=dtype)
            expected = truth(logits, inputs, OPTIONS[option], temperature=temperature)
            given = logits.clone().to(device), on_device(inputs, device.type), OPTIONS[option]
            got = {k: v.cpu() for k, v in vars(run_chunk(name, *given, temperature=temperature)).items()}
            carries = inputs.weights != 0
            errors = {
                "gradient error": relative(got["gradient"], expected.gradient),
                "log-prob error": float((got["log_probs"] - expected.log_probs)[carries].abs().max()),
            }
            good = errors["gradient error"] < GRADIENT[dtype] and errors["log-prob error"] < 1e-4
            rows.append(entry | errors | {"ok": good and torch.equal(got["flags"], expected.flags), "note": ""})
    return rows


def weight_gradient(device: torch.device) -> dict[str, Any]:
    """bfloat16 operands accumulated into float32, in two additions."""
    generator = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(256, 64, device=device), torch.zeros(256, 64, dtype=torch.float64)
    for _ in range(2):
        gradient, hidden = (torch.randn(512, n, generator=generator).bfloat16() for n in (256, 64))
        add_weight_gradient_(total, gradient.to(device), hidden.to(device))
        exact += gradient.double().t() @ hidden.double()
    error = relative(total.cpu(), exact)
    return {"implementation": "weight gradient", "gradient error": error, "ok": error < 1e-5, "note": ""}


def sanitize(dry_run: bool) -> int:
    """Races and wild accesses of the kernels, in processes of their own; 0: none."""
    worker = str(ROOT / "tests" / "gpu" / "policy_loss_worker.py")
    if dry_run or shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not here: left out")
        return 0 if dry_run else 1
    status = 0
    for tool in ("racecheck", "memcheck"):
        for name in ("triton", "triton_row", "cuda_cluster"):
            prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            command = [*prefix, sys.executable, worker, name, "paper", "/dev/null", "32768"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            verdict = "clean" if result.returncode == 0 else (result.stdout + result.stderr)[-400:]
            print(f"{tool} {name}: {verdict}", flush=True)
            status |= int(result.returncode != 0)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when an implementation is wrong")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.sanitize:
        return sanitize(arguments.dry_run)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    rows = [*accuracy(device, 512 if arguments.dry_run else 151_936), weight_gradient(device)]
    shapes = [(512, 64, 256)] if arguments.dry_run else [(32_768, 2048, 8192), (152_064, 3584, 8192)]
    precision = [row for shape in shapes for row in logits_precision.compare(device, *shape)]
    columns = ("implementation", "options", "logits", "gradient error", "log-prob error", "ok", "note")
    print_table(columns, rows)
    print_table(list(precision[0]), precision)
    write_json(arguments.json, "gpu_kernels", rows, logits_precision=precision)
    ran = [row for row in rows if row["ok"] is not None]
    wrong = sum(not row["ok"] for row in ran)
    print(f"{len(ran)} of {len(rows)} combinations ran, {wrong} wrong")
    return int(arguments.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
