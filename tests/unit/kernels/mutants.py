"""Break the kernels in one place at a time and see that the checks notice.

    python tests/unit/kernels/mutants.py            # every mutant, one line each; exit 1 when one survives
    python tests/unit/kernels/mutants.py loss-sign  # only these

A mutant is a text replacement in one kernel source. Each runs in a forked child with its own copy of the package, so
that nothing is imported twice and a crash (an overflowing offset) counts as caught.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]
    import interpreted_triton  # noqa: F401

import torch

KERNELS = Path(__file__).parents[3] / "megatron_r1reward" / "kernels"
PACKAGE = "megatron_r1reward.kernels"
SOFTMAX, LOSS = "policy_loss/triton_softmax.py", "policy_loss/triton_loss.py"
GRADIENT, ROW = "policy_loss/triton_gradient.py", "policy_loss/triton_row.py"
TORCH_ROWS, HEAD = "policy_loss/torch_rows.py", "linear_policy_loss.py"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`before` occurs in the file and becomes `after` (first occurrence)."""

    name: str
    file: str
    before: str
    after: str


def _mutant(name: str, file: str, before: str, after: str) -> Mutant:
    return Mutant(name=name, file=file, before=before, after=after)


MUTANTS = (
    _mutant("int32-rows", SOFTMAX, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    _mutant("no-decay", SOFTMAX, "total = total * decay + power", "total = total + power"),
    _mutant("entropy-shift", SOFTMAX, "decay * (weighted + total * shift)", "decay * weighted"),
    _mutant("banned-logits", SOFTMAX, "(power > 0.0) | (power != power)", "power == power"),
    _mutant("target-of-other-shard", SOFTMAX, "(column >= 0) & (column < columns)", "column < columns"),
    _mutant("padding-in-softmax", SOFTMAX, "mask=column < columns, other", "mask=column >= 0, other"),
    _mutant("loss-sign", LOSS, "-tl.exp2(log_ratio * LOG2_E) * scaled", "tl.exp2(log_ratio * LOG2_E) * scaled"),
    _mutant("preclip-low-gone", LOSS, "below = log_ratio < preclip_low", "below = log_ratio < -1e30"),
    _mutant("preclip-gradient", LOSS, "below | above | clipped_low | clipped_high", "clipped_low | clipped_high"),
    _mutant("clip-wrong-side", LOSS, "clipped_low = negative &", "clipped_low = positive &"),
    _mutant("clip-high-gone", LOSS, "(positive | negative) & (log_ratio > upper)", "negative & (log_ratio > upper)"),
    _mutant("dual-clip-gone", LOSS, "(positive | negative) & (log_ratio > upper)", "positive & (log_ratio > upper)"),
    _mutant("filter-keeps-nan", LOSS, "(advantage != advantage) |", "(advantage < -1e30) |"),
    _mutant("importance-uncapped", LOSS, "importance > importance_cap", "importance > 1e30"),
    _mutant("importance-inverted", LOSS, "(old - sampler) * LOG2_E", "(sampler - old) * LOG2_E"),
    _mutant("k2-slope", LOSS, "slope = gap\n", "slope = 2.0 * gap\n"),
    _mutant("k3-slope-near-zero", LOSS, "-(x + tail), -direct", "x + tail, -direct"),
    _mutant("k3-unbounded", LOSS, "tl.where(value > kl_bound, kl_bound, value)", "value"),
    _mutant("k3-bound-pulls", LOSS, "tl.where(value > kl_bound, 0.0, slope)", "slope"),
    _mutant("torch-k3-bound", TORCH_ROWS, "torch.where(bounded_R, 0.0, -excess_R)", "-excess_R"),
    _mutant("excluded-ids", "lm_head.py", "self.excluded_columns, -torch.inf", "self.excluded_columns, 0.0"),
    _mutant("k3-sign", LOSS, "x = -gap", "x = gap"),
    _mutant("entropy-sign", LOSS, "-entropy_coefficient * weight, 0.0", "entropy_coefficient * weight, 0.0"),
    _mutant("non-finite-unseen", LOSS, "broken.to(tl.int32) * 64", "broken.to(tl.int32) * 0"),
    _mutant("merge-skips-rank", LOSS, "for rank in range(ranks)", "for rank in range(1, ranks)"),
    _mutant("merge-scale", LOSS, "total = decay * total + other_decay * other_total", "total = total + other_total"),
    _mutant("gradient-no-temperature", GRADIENT, "gradient) * inverse_temperature", "gradient)"),
    _mutant("gradient-target", GRADIENT, "gradient + grad_log_prob, gradient)", "gradient, gradient)"),
    _mutant("gradient-entropy", GRADIENT, "log2_p * LN_2 + entropy", "log2_p * LN_2"),
    _mutant("gradient-padding", GRADIENT, "tl.where(column < columns, gradient, 0.0)", "gradient + 1e-3"),
    _mutant("gradient-int32-rows", GRADIENT, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    _mutant("idle-rows-keep-logits", GRADIENT, "zero_row(row_ptr, padded_columns, BLOCK)", "pass"),
    _mutant("row-order", GRADIENT, "(blocks - 1 - index) * BLOCK", "(blocks - index) * BLOCK"),
    _mutant("row-idle", ROW, "zero_row(row_ptr, padded_columns, BLOCK)", "pass"),
    _mutant("torch-floor", TORCH_ROWS, ".clamp_(min=FLOOR)", ""),
    _mutant("torch-target", TORCH_ROWS, "torch.where(here_R[tile], target_C, -torch.inf)", "target_C"),
    _mutant("torch-idle", TORCH_ROWS, "logits_RV.index_fill_(0, idle_R, 0)", "pass"),
    _mutant("torch-padding", TORCH_ROWS, "logits_RV[:, shard.width :] = 0", "pass"),
    _mutant("torch-dual-clip", TORCH_ROWS, "log_ratio_R > dual", "log_ratio_R > 1e30"),
    _mutant("torch-preclip-gradient", TORCH_ROWS, "below_R | above_R | clipped_low_R", "clipped_low_R"),
    _mutant("torch-rows", TORCH_ROWS, "usable_advantages(inputs)[0] != 0", "usable_advantages(inputs)[0] == 0"),
    _mutant("merge-order", TORCH_ROWS, "scale_R * (weighted_R + total_R * shift_R)", "scale_R * weighted_R"),
    _mutant("head-scale", HEAD, "grad_weight_VH.mul_(upstream)", "pass"),
    _mutant("head-scatter", HEAD, "index_copy_(0, ctx.rows, grad_hidden_AH)", "clone()"),
)  # fmt: skip
# One of each kind: few enough for every test run.
QUICK = ("no-decay", "preclip-gradient", "dual-clip-gone", "k3-bound-pulls", "gradient-target", "torch-floor")


def check_everything() -> None:
    """A compact version of the tests; raises when a kernel is wrong. Imports at call time: the mutant's modules."""
    import mutant_checks

    mutant_checks.run()


def _child(mutant: Mutant | None, folder: str) -> None:
    """Redirect the kernels package to a (mutated) copy, run the checks, and exit 1 when they fail."""
    import os

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    copy = Path(folder) / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    if mutant is not None:
        file = copy / mutant.file
        file.write_text(file.read_text().replace(mutant.before, mutant.after, 1))
    for name in [n for n in sys.modules if n.startswith(PACKAGE + ".") or n in ("kernel_cases", "mutant_checks")]:
        del sys.modules[name]
    sys.modules[PACKAGE].__path__ = [str(copy)]
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["TRITON_INTERPRET"] = "1"  # the copy's kernels are decorated again
    torch.set_num_threads(1)
    try:
        check_everything()
    except BaseException:
        os._exit(1)
    os._exit(0)


def survives(mutant: Mutant | None, *, timeout_s: float = 500.0) -> bool:
    """Whether the checks pass with this mutation; None: the unbroken kernels, which must.

    A crash or a hang counts as noticed.
    """
    import megatron_r1reward.kernels  # noqa: F401  (its __path__ is redirected in the child)

    if mutant is not None:
        assert mutant.before in (KERNELS / mutant.file).read_text(), f"{mutant.name}: its text is gone from the source"
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(target=_child, args=(mutant, folder))
        child.start()
        child.join(timeout_s)
        if child.is_alive():
            child.kill()
            child.join()
        return child.exitcode == 0


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"unknown mutants: {', '.join(sorted(unknown))}")
        return 2
    if not survives(None):
        print("the checks fail on the unbroken kernels")
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survivors = []
    for mutant in chosen:
        alive = survives(mutant)
        survivors += [mutant.name] if alive else []
        print(f"{'SURVIVES' if alive else 'caught':9} {mutant.name:24} {mutant.file}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
