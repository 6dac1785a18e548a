"""Why a vLLM server died, from its log: the cause, what its user can change, and the last lines."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(r"\b\w+(?:Error|Exception|Interrupt): .*")
_ENGINE = "(EngineCore"
_NOISE = re.compile(r"nanobind|- leaked|skipped remainder")  # printed by triton's bindings at every exit
_TAIL_LINES = 25
_ADDRESS_IN_USE = re.compile(rb"\[Errno 98\]|Address already in use|address already in use")

# vLLM's words about what its user can mend -> the keys of this server's section of the run file.
_FIXES = (
    (
        "is less than desired GPU memory utilization",
        "lower gpu_memory_utilization, or end what else is on that GPU (colocated servers share it with the trainer)",
    ),
    (
        "No available memory for the cache blocks|which is larger than the available KV cache",
        "raise gpu_memory_utilization (on a CPU kv_cache_bytes) or tensor_parallel_size, or lower max_model_len",
    ),
    (
        "CUDA out of memory|OutOfMemoryError|can't allocate memory|not enough memory",
        "the model does not fit: raise tensor_parallel_size, lower max_num_seqs or max_model_len, or set "
        "quantization='fp8'",
    ),
    (
        "is greater than the derived max_model_len",
        "lower max_model_len to max_position_embeddings of the model's config.json",
    ),
    ("address already in use|Address already in use", "another process has the port: end it, or choose another port"),
    ("No space left on device", "free some space in the temporary folder ($TMPDIR), in /dev/shm and where it writes"),
    ("contains custom code which must be executed", "set trust_remote_code=true if you trust that code"),
)


def explain(log_path: Path, start: int = 0) -> str:
    """The likely cause of death with what mends it, and the last lines of a vLLM log.

    An error appears once per layer that it passes through. If the engine process reported any, its last one is the
    cause (earlier ones may have been survived); otherwise the API process failed, and its first one is. One that says
    what its user can mend comes before those that follow from it.

    Args:
        start: byte at which the server's life begins in the log.
    """
    with log_path.open("rb") as log:
        log.seek(start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if not _NOISE.search(line)]
    errors = [(line, match[0]) for line in lines if "WARNING" not in line and (match := _ERROR.search(line))]
    of_engine = [error for line, error in errors if line.startswith(_ENGINE)]
    mendable = [f"{error.rstrip('. ')}: {fix}" for error in of_engine or [e for _, e in errors] if (fix := _fix(error))]
    cause = (mendable[-1:] or of_engine[-1:] or [error for _, error in errors[:1]] or ["the log shows no error"])[0]
    tail = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
    return f"{cause}\nthe end of its log {log_path}:\n{tail}"


def _fix(error: str) -> str | None:
    return next((fix for pattern, fix in _FIXES if re.search(pattern, error)), None)


def address_in_use(log_path: Path, start: int = 0) -> bool:
    """Whether a server found its port taken; `start` as in `explain`."""
    with log_path.open("rb") as log:
        log.seek(start)
        return _ADDRESS_IN_USE.search(log.read()) is not None
