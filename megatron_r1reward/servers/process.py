"""The life of one vLLM server: start, readiness by a real completion, restart, end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.network.server_api import ServerCallError, call, open_client, unhealthy
from megatron_r1reward.network.tokens import new_token
from megatron_r1reward.servers.command import WeightTransport, sees_gpu, server_command, server_environment
from megatron_r1reward.servers.keeper import KEEPER_GRACE_S, ScratchFolder, remove_of_killed, shared_memory_of
from megatron_r1reward.servers.member import Report, ServerError

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
_SIGTERM_GRACE_S = KEEPER_GRACE_S + 5.0
_POLL_INTERVAL_S = 0.2
_PORT_ATTEMPTS = 3
_ONE_TOKEN = {"prompt": "ready?", "max_tokens": 1, "temperature": 0}
_ONE_REWARD = {"input": "ready?", "use_activation": False}


def first_request(served_name: str | None, *, scalar: bool) -> tuple[str, dict[str, object]]:
    """Route and body of a request; a server that answers it is ready. `scalar`: of a scalar reward model."""
    path, body = ("/classify", _ONE_REWARD) if scalar else ("/v1/completions", _ONE_TOKEN)
    return path, dict(body) if served_name is None else {**body, "model": served_name}


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


class VllmServer:
    """A vLLM server as a child process in a process group of its own; ends with its parent.

    Use as a context manager, or `start()` several, then `wait_ready()` on each, and `stop()`; see `start_servers`.
    Arguments are those of `server_command`. The port is the kernel's choice and reserved; should somebody else take
    it all the same, the server starts on another one, so `url` is known for sure only when `wait_ready` has returned.
    `token` is what requests must carry; None makes a new one. `port` is tried first, if it is not 0.
    """

    def __init__(
        self,
        section: VllmSection,
        *,
        model_path: Path,
        log_path: Path,
        served_name: str = "policy",
        host: str | None = None,
        on_cpu: bool | None = None,
        gpu_ids: Sequence[int] = (),
        weight_transfer: WeightTransport | None = None,
        media_root: Path | None = None,
        pixels: tuple[int, int] | None = None,
        sleep_mode: bool = False,
        in_flight: bool = False,
        sampled_log_probs: bool = False,
        token: str | None = None,
        port: int = 0,
    ) -> None:
        if not (model_path / "config.json").is_file():
            raise ValueError(f"model path {model_path} has no config.json: give a Hugging Face checkpoint folder")
        self.served_name = served_name
        self.log_path = log_path
        self.token = token or new_token()
        self._section = section
        self._host = section.host if host is None else host
        self._on_cpu = not sees_gpu() if on_cpu is None else on_cpu
        self._model_path = model_path
        self.weight_transfer = weight_transfer
        self._media_root, self._pixels = media_root, pixels
        self._sleep_mode, self._in_flight = sleep_mode, in_flight
        self._sampled_log_probs = sampled_log_probs
        self._environment = server_environment(
            section,
            token=self.token,
            developer_routes=weight_transfer is not None,
            on_cpu=self._on_cpu,
            gpu_ids=gpu_ids,
            base=os.environ,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: ScratchFolder | None = None
        self._shared_memory: frozenset[Path] = frozenset()
        self._log_start = 0  # an earlier life's lines are not this one's
        self._reservation: socket.socket | None = None
        self._reserve_port(port)

    def _reserve_port(self, wanted: int = 0) -> None:
        """Bound but never listening: nobody else is given the port before the server has it, nor between restarts."""
        if self._reservation is not None:
            self._reservation.close()
        reservation = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            reservation.bind((self._host, wanted))
        except OSError:
            if not wanted:
                raise
            reservation.bind((self._host, 0))
        self._reservation = reservation
        self.port: int = reservation.getsockname()[1]
        self._command = server_command(
            self._section,
            model_path=self._model_path,
            port=self.port,
            served_name=self.served_name,
            host=self._host,
            on_cpu=self._on_cpu,
            weight_transfer=self.weight_transfer,
            media_root=self._media_root,
            pixels=self._pixels,
            sleep_mode=self._sleep_mode,
            in_flight=self._in_flight,
            sampled_log_probs=self._sampled_log_probs,
        )

    @property
    def url(self) -> str:
        # A server on all interfaces is reached from here by the loopback address.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Process id (and process group) of the running server, None when there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def returncode(self) -> int | None:
        """Exit code of a server that has ended by itself (128 + n: killed by signal n); None otherwise."""
        return self._process.poll() if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once; ServerError when the server has been closed meanwhile."""
        assert self._process is None, "the server was started already"
        if self._reservation is None:
            raise ServerError(f"server {self.served_name!r} ({self.url}) is closed")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = ScratchFolder()
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                env=self._environment | {"TMPDIR": str(self._scratch.path)},
                stdin=subprocess.PIPE,  # the keeper ends the server when this pipe closes
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def restart(self, reason: str = "") -> None:
        """End what is left of the process, even if it hangs, and start a new one on the same port; returns at once."""
        self.stop(grace_s=0.0)
        self.start()

    def wait_ready(self, progress: Report | None = None) -> None:
        """Block until the server is healthy and has completed a request.

        Raises:
            ServerError: the process died, or `startup_timeout_s` passed.
        """
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._wait_ready(progress)
                return
            except ServerError:
                if self.alive or attempt == _PORT_ATTEMPTS or not address_in_use(self.log_path, self._log_start):
                    raise
            if progress is not None:
                progress(f"{self.served_name}: port {self.port} is taken by another process; trying another one")
            self.stop()
            self._reserve_port()
            self.start()

    def _wait_ready(self, progress: Report | None) -> None:
        started = time.monotonic()
        limit_s = self._section.startup_timeout_s
        while unhealthy(self.url, attempts=1) is not None:
            self.check_alive()
            if time.monotonic() - started > limit_s:
                raise ServerError(self._describe(f"was not ready after {limit_s:g} s"))
            time.sleep(_POLL_INTERVAL_S)
        self.check_alive()  # whoever answered might be somebody else on our port
        self._complete_one_request(limit_s)
        assert self.pid is not None
        self._shared_memory = shared_memory_of(self.pid)  # who is killed cannot clean up
        if progress is not None:
            progress(f"{self.served_name} at {self.url} ready after {time.monotonic() - started:.1f} s")

    def check_alive(self) -> None:
        """Raise ServerError, with the last lines of the log, if the process has ended."""
        if not self.alive:
            code = self._process.returncode if self._process is not None else None
            how = f"exit code {code}"
            if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
                how = (
                    "killed by SIGKILL, which the kernel does when memory is used up: lower kv_cache_bytes, "
                    "max_num_seqs or the number of servers on this machine"
                )
            raise ServerError(self._describe(f"is not running ({how})"))

    def stop(self, *, grace_s: float = _SIGTERM_GRACE_S) -> None:
        """End the server: SIGTERM to its keeper, which ends everything in time; SIGKILL for all its process group after
        `grace_s` (a stopped keeper, or a server that hangs and is not worth waiting for). Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if grace_s > 0:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
        finally:
            shared_memory = self._shared_memory | shared_memory_of(process.pid)
            with suppress(ProcessLookupError):  # usually the whole group is gone by now
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
            remove_of_killed(process.pid, shared_memory)
            self._shared_memory = frozenset()
            assert self._scratch is not None
            self._scratch.remove()

    def give_up(self, reason: str) -> None:
        """It hangs or fails for good: end what is left."""
        self.stop(grace_s=0.0)

    def close(self) -> None:
        """`stop`, and give the port back."""
        self.stop()
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None

    def __enter__(self) -> VllmServer:
        start_servers([self])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _complete_one_request(self, timeout_s: float) -> None:
        path, body = first_request(self.served_name, scalar=is_scalar_folder(self._model_path))
        try:
            with open_client(timeout_s=timeout_s) as client:
                call(client, "POST", f"{self.url}{path}", token=self.token, body=body)
        except ServerCallError as error:
            raise ServerError(self._describe(f"did not complete its first request ({error})")) from error

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
