"""One vLLM server: its command line, its environment and its life.

Serves rollouts (token ids in and out, weight transfer) and judges (plain OpenAI chat) alike.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

import httpx
import torch

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.rollout.server_log import explain
from megatron_r1reward.rollout.vllm_main import FORK_FLAG

Report = Callable[[str], None]  # takes a line for the user

# The trainer's own distributed set-up, which vLLM's workers would take for theirs.
_TRAINER_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
)  # fmt: skip
_MIN_BATCHED_TOKENS = 8192
_SIGTERM_GRACE_S = 15.0
_POLL_INTERVAL_S = 0.2


class ServerError(RuntimeError):
    """A server did not start, or died. The message names the log and ends with its last lines."""


def server_command(
    section: ServerSection,
    *,
    model_path: Path,
    port: int,
    served_name: str,
    host: str = "127.0.0.1",
    on_cpu: bool = False,
    weight_transfer: Literal["gloo", "nccl", "ipc"] | None = None,
    media_root: Path | None = None,
    pixels: tuple[int, int] | None = None,
) -> list[str]:
    """The command that runs one server.

    Args:
        model_path: HF checkpoint folder.
        served_name: what requests call the model.
        weight_transfer: transport of weight pushes; None for a server whose weights never change (a judge).
        media_root: folder below which requests may name images as file:// URLs; None forbids it.
        pixels: (min_pixels, max_pixels) of the image processor, which must be the trainer's; None: the checkpoint's.
    """
    command = [sys.executable, "-m", "megatron_r1reward.rollout.vllm_main"]
    if _forks_engine_core(section, on_cpu):
        command += [FORK_FLAG]
    command += ["--model", str(model_path), "--served-model-name", served_name, "--host", host, "--port", str(port)]
    command += ["--dtype", section.dtype, "--tensor-parallel-size", str(section.tensor_parallel_size)]
    command += ["--max-model-len", str(section.max_model_len), "--max-num-seqs", str(section.max_num_seqs)]
    # Sampling parameters come from requests only; "auto" would add the checkpoint's generation_config.json.
    command += ["--generation-config", "vllm"]
    command += ["--enable-scale-out"]  # /inference/v1/generate: token ids in, token ids out
    command += ["--limit-mm-per-prompt", json.dumps({"video": 0})]
    command += ["--disable-uvicorn-access-log"]
    if on_cpu:
        command += ["--enforce-eager"]  # compiling takes a minute and gains nothing on small models
        # vLLM cannot rewind a CPU generator: a seeded request whose prefill is split kills the engine.
        command += ["--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(section.max_model_len, _MIN_BATCHED_TOKENS))]
        if section.kv_cache_bytes is not None:
            command += ["--kv-cache-memory-bytes", str(section.kv_cache_bytes)]
    else:
        command += ["--gpu-memory-utilization", str(section.gpu_memory_utilization)]
    if weight_transfer is not None:
        command += ["--weight-transfer-config", json.dumps({"backend": weight_transfer})]
    if media_root is not None:
        command += ["--allowed-local-media-path", str(media_root.resolve())]
    if pixels is not None:
        command += ["--mm-processor-kwargs", json.dumps({"min_pixels": pixels[0], "max_pixels": pixels[1]})]
    return [*command, *section.extra_args]


def server_environment(
    section: ServerSection, *, on_cpu: bool = False, gpu_ids: Sequence[int] = (), base: Mapping[str, str]
) -> dict[str, str]:
    """The server's environment: `base` without the trainer's distributed variables, plus what vLLM needs."""
    environment = {name: value for name, value in base.items() if name not in _TRAINER_VARIABLES}
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # /pause, /resume, weight transfer and cache resets
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # clients keep connections between steps
        "HF_HUB_OFFLINE": "1",  # models are folders; a missing file is an error, not a download
    }
    if on_cpu:
        environment |= {
            "OMP_NUM_THREADS": str(section.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" would put every server of a machine on the same cores
            "TORCH_COMPILE_DISABLE": "1",  # otherwise the sampler is compiled at the first request: a minute
        }
        if section.tensor_parallel_size == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker lives in the engine's process
    if gpu_ids:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpu_ids))
    return environment


def _forks_engine_core(section: ServerSection, on_cpu: bool) -> bool:
    return on_cpu and section.num_threads == 1 and section.tensor_parallel_size == 1


class VllmServer:
    """A vLLM server as a child process in a process group of its own; ends with its parent.

    Use as a context manager, or `start()` several, then `wait_ready()` on each, and `stop()`; see `start_servers`.
    Arguments are those of `server_command`; the port is the kernel's choice and reserved for the server's life.
    """

    def __init__(
        self,
        section: ServerSection,
        *,
        model_path: Path,
        log_path: Path,
        served_name: str = "policy",
        host: str = "127.0.0.1",
        on_cpu: bool | None = None,
        gpu_ids: Sequence[int] = (),
        weight_transfer: Literal["gloo", "nccl", "ipc"] | None = None,
        media_root: Path | None = None,
        pixels: tuple[int, int] | None = None,
    ) -> None:
        if not (model_path / "config.json").is_file():
            raise ValueError(f"model path {model_path} has no config.json: give a Hugging Face checkpoint folder")
        on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
        # Bound but never listening: nobody else gets the port before the server has it, nor between restarts.
        self._reservation = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((host, 0))
        port: int = self._reservation.getsockname()[1]
        self.served_name = served_name
        self.log_path = log_path
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._startup_timeout_s = section.startup_timeout_s
        self._environment = server_environment(section, on_cpu=on_cpu, gpu_ids=gpu_ids, base=os.environ)
        self._command = server_command(
            section,
            model_path=model_path,
            port=port,
            served_name=served_name,
            host=host,
            on_cpu=on_cpu,
            weight_transfer=weight_transfer,
            media_root=media_root,
            pixels=pixels,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # an earlier life's lines are not this one's

    @property
    def pid(self) -> int | None:
        """Process id (and process group) of the running server, None when there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def returncode(self) -> int | None:
        """Exit code of a server that has ended by itself (-n: killed by signal n); None otherwise."""
        return self._process.poll() if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once."""
        assert self._process is None, "the server was started already"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,  # the server ends when this pipe closes
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, progress: Report | None = None) -> None:
        """Block until the server is healthy and has completed a request.

        Raises:
            ServerError: the process died, or `startup_timeout_s` passed.
        """
        started = time.monotonic()
        with httpx.Client(timeout=self._startup_timeout_s, trust_env=False) as http:
            while not self._answers_health(http):
                self.check_alive()
                if time.monotonic() - started > self._startup_timeout_s:
                    raise ServerError(self._describe(f"was not ready after {self._startup_timeout_s:g} s"))
                time.sleep(_POLL_INTERVAL_S)
            self._complete_one_request(http)
        if progress is not None:
            progress(f"{self.served_name} at {self.url} ready after {time.monotonic() - started:.1f} s")

    def check_alive(self) -> None:
        """Raise ServerError, with the last lines of the log, if the process has ended."""
        if not self.alive:
            code = self._process.returncode if self._process is not None else None
            raise ServerError(self._describe(f"is not running (exit code {code})"))

    def stop(self) -> None:
        """End the server: SIGTERM, then SIGKILL for whatever is left of its process group. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SIGTERM_GRACE_S)
        finally:
            with suppress(ProcessLookupError):  # usually the whole group is gone by now
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def __enter__(self) -> VllmServer:
        start_servers([self])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers_health(self, http: httpx.Client) -> bool:
        try:
            return http.get(f"{self.url}/health").is_success
        except httpx.TransportError:  # not listening yet
            return False

    def _complete_one_request(self, http: httpx.Client) -> None:
        body = {"model": self.served_name, "prompt": "ready?", "max_tokens": 1, "temperature": 0}
        try:
            response = http.post(f"{self.url}/v1/completions", json=body)
        except httpx.TransportError as error:
            raise ServerError(self._describe(f"broke off its first request ({error})")) from error
        if response.is_error:
            raise ServerError(self._describe(f"failed its first request: {response.status_code} {response.text[:500]}"))

    def _describe(self, what: str) -> str:
        return f"server {self.served_name!r} ({self.url}) {what}: {explain(self.log_path, self._log_start)}"


def start_servers(servers: Iterable[VllmServer], progress: Report | None = None) -> None:
    """Start all servers side by side and wait until each is ready; if one fails, all are stopped again."""
    servers = list(servers)
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(progress)
    except BaseException:
        for server in servers:
            server.stop()
        raise
