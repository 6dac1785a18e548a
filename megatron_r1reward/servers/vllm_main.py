"""`python -m megatron_r1reward.servers.vllm_main [--fork-engine-core] ARGS`: vLLM's OpenAI server, with two additions.

1. It never outlives the process that started it, however and whenever that ends (`keeper`).
2. `--fork-engine-core` forks vLLM's engine process from the API process, and from it the workers of a tensor-parallel
   server, where vLLM on a CPU would start fresh interpreters, each of which spends most of the start-up time (about
   10 s) on importing the same modules again. Forking is vLLM's own choice on GPUs. On a CPU it needs
   OMP_NUM_THREADS=1: OpenMP's thread pool does not survive a fork.

(The `vllm` console script of the CPU build cannot be used: it asks for the metadata of a distribution named `vllm`.)
"""

from __future__ import annotations

import sys

from megatron_r1reward.processes import quick_imports, run_program
from megatron_r1reward.servers.keeper import keep

FORK_FLAG = "--fork-engine-core"


def _fork_engine_core() -> None:
    import multiprocessing

    import vllm.v1.engine.utils as engine_utils
    import vllm.v1.executor.multiproc_executor as executor

    engine_utils.get_mp_context = executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def main() -> None:
    with quick_imports():
        if FORK_FLAG in sys.argv:
            sys.argv.remove(FORK_FLAG)
            _fork_engine_core()
        from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    keep()
    run_program(main)
