"""One table of what a run of `gpu_suite.sh` has left: python benchmarks/gpu_table.py RESULTS_DIR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from reporting import print_table


def figure(file: Path) -> str:
    """The line that counts of one stage's JSON."""
    content: dict[str, Any] = json.loads(file.read_text())
    rows = content["rows"]
    match content["benchmark"]:
        case "gpu_kernels":
            ran = [row for row in rows if row["ok"] is not None]
            errors = {row["precision.logits"]: row["mean error"] for row in content["logits_precision"]}
            logits = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            return f"{sum(row['ok'] for row in ran)} of {len(ran)} right; mean error of log-probs by logits: {logits}"
        case "policy_loss":
            timed = [row for row in rows if row["ms"]]
            best = min(timed, key=lambda row: row["ms"] / row["rows"] / row["columns"], default=None)
            if best is None:
                return "nothing timed"
            share = best["% of floor"]
            return f"{best['provider']}: {best['ms']:.2f} ms" + (f", {share:.0f} % of the floor" if share else "")
        case "gpu_training":
            return "; ".join(
                f"{row['stage']} {row['step s']:.3g} s/step"
                + (f", {row['peak GiB']:.1f} GiB (plan {row['off %']:+.0f} %)" if row["peak GiB"] else "")
                + (f", LM head {row['LM head %']:.0f} %" if row["LM head %"] is not None else "")
                for row in rows
            )
        case "gpu_ipc_push":
            return f"{rows[0]['transport']} {rows[0]['GB/s']:.1f} GB/s, right: {rows[0]['right']}"
    return f"{len(rows)} rows"


def main() -> int:
    results = Path(sys.argv[1])
    table = []
    for line in (results / "stages.jsonl").read_text().splitlines():
        stage = json.loads(line)
        file = results / f"{stage['name']}.json"
        stage["figure"] = figure(file) if file.exists() else ""
        table.append(stage)
    print_table(("name", "seconds", "limit", "status", "figure"), table)
    facts = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    if facts:
        print(f"{facts[0]['device']}, {facts[0]['date']}, commit {facts[0]['commit']}, {facts[0]['versions']}")
    return int(any(stage["status"] not in (0, "left out") for stage in table))


if __name__ == "__main__":
    sys.exit(main())
