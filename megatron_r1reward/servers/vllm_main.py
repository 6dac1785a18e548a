"""`python -m megatron_r1reward.servers.vllm_main [--fork-engine-core] ARGS`: vLLM's OpenAI server, with two additions.

1. It ends when its standard input does. The starter holds the other end of that pipe, so a server never outlives the
   process that started it, however that process ended.
2. `--fork-engine-core` forks vLLM's engine process from the API process where vLLM on a CPU would start a fresh
   interpreter, which spends half of the start-up time (about 15 s) on importing the same modules again. Forking is
   vLLM's own choice on GPUs. On a CPU it needs OMP_NUM_THREADS=1: OpenMP's thread pool does not survive a fork.

(The `vllm` console script of the CPU build cannot be used: it asks for the metadata of a distribution named `vllm`.)
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import threading

from megatron_r1reward.processes import quick_exit, quick_imports

FORK_FLAG = "--fork-engine-core"
SCRATCH_PREFIX = "r1reward-server-"


def _end_with_stdin() -> None:
    """Ask this process to stop (SIGTERM) once the starter's end of standard input is closed."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _remove_scratch_folder_at_exit() -> None:
    """The starter removes this server's TMPDIR, unless it was killed."""
    folder, pid = os.environ.get("TMPDIR", ""), os.getpid()

    def remove() -> None:
        if os.getpid() == pid:  # not in forked children
            shutil.rmtree(folder, ignore_errors=True)

    if os.path.basename(folder).startswith(SCRATCH_PREFIX):
        atexit.register(remove)


def _fork_engine_core() -> None:
    import multiprocessing

    import vllm.v1.engine.utils as engine_utils

    engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def main() -> None:
    _remove_scratch_folder_at_exit()
    threading.Thread(target=_end_with_stdin, name="end-with-stdin", daemon=True).start()
    with quick_imports():
        if FORK_FLAG in sys.argv:
            sys.argv.remove(FORK_FLAG)
            _fork_engine_core()
        from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    with quick_exit():
        main()
