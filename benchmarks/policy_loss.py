"""The policy loss and the LM head: time, memory and gradient error against other implementations.

    python benchmarks/policy_loss.py [--check] [--json benchmarks/results/policy_loss_cpu.json]

On a CPU: our chunked paths against plain torch over all rows and Liger's chunked loss. Goal: the fused path at least 3
times faster than plain torch over all rows, with under a tenth of its extra memory. With a GPU, in addition: copy and
matmul ceilings, our variants and peers from materialised logits, and the fused head over a range of active shares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
if "--dry-run" in sys.argv:
    import interpreted_triton  # noqa: F401  (before anything imports Triton)

import policy_loss_cpu  # noqa: E402
import torch  # noqa: E402
from reporting import print_table, write_json  # noqa: E402

FASTER, MEMORY = 3.0, 0.1  # goals on a CPU at the default size


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = policy_loss_cpu.Size()
    parser.add_argument("--tokens", type=int, default=size.tokens)
    parser.add_argument("--vocabulary", type=int, default=size.vocabulary)
    parser.add_argument("--hidden", type=int, default=size.hidden)
    parser.add_argument("--active", type=float, default=size.active, help="share of rows that carry a loss")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpu", action="store_true", help="only the GPU part")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for the GPU part")
    parser.add_argument("--dry-run", action="store_true", help="the GPU part on a CPU, tiny, interpreted: no timing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def cpu_part(arguments: argparse.Namespace) -> bool:
    """Print the CPU table and its figure; whether the goals are met."""
    size = policy_loss_cpu.Size(
        tokens=arguments.tokens, vocabulary=arguments.vocabulary, hidden=arguments.hidden, active=arguments.active
    )
    torch.set_num_threads(arguments.threads)
    rows = policy_loss_cpu.run(size, repeats=arguments.repeats, threads=arguments.threads)
    print(f"CPU, {size}, {arguments.threads} threads")
    print_table(list(rows[0]), rows)
    write_json(arguments.json, "policy_loss", rows, size=vars(size))
    fused = next(row for row in rows if row["variant"] == "fused")
    met = fused["times faster"] >= FASTER and fused["of naive memory"] < MEMORY and fused["gradient difference"] < 1e-4
    if not torch.cuda.is_available():
        print("no GPU: its table is left out")
    print(
        f"fused: {fused['times faster']:.2f} times faster than naive torch (goal {FASTER:g}), "
        f"{100 * fused['of naive memory']:.1f} % of its extra memory (goal under {100 * MEMORY:g} %)"
    )
    return bool(met)


def main() -> int:
    arguments = parse()
    if arguments.worker:
        size = policy_loss_cpu.Size(
            tokens=arguments.tokens, vocabulary=arguments.vocabulary, hidden=arguments.hidden, active=arguments.active
        )
        row = policy_loss_cpu.measure(arguments.worker, size, repeats=arguments.repeats, folder=arguments.folder)
        print(json.dumps(row))
        return 0
    if arguments.gpu or arguments.dry_run:
        if not (torch.cuda.is_available() or arguments.dry_run):
            print("no GPU: its table is left out")
            return 0
        import policy_loss_gpu

        met = policy_loss_gpu.run(arguments.json, budget_s=arguments.budget, dry_run=arguments.dry_run)
    else:
        met = cpu_part(arguments)
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
