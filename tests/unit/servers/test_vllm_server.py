"""Command lines, environments, and the life of a server process (with other programs in vLLM's place)."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from megatron_r1reward.config.rl_sections import COLDEST
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.servers.command import server_command, server_environment
from megatron_r1reward.servers.member import ServerError
from megatron_r1reward.servers.process import VllmServer, explain, first_request, start_servers


def command(section: ServerSection, **options: object) -> list[str]:
    return server_command(section, model_path=Path("/models/m"), port=8123, served_name="policy", **options)  # type: ignore[arg-type]


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_command_of_a_rollout_server_on_a_cpu() -> None:
    section = ServerSection(kv_cache_bytes=1 << 27, max_model_len=2048, extra_args=("--seed", "3"))
    words = command(section, on_cpu=True, weight_transfer="gloo", media_root=Path("/data"), pixels=(3136, 50176))
    assert value(words, "--weight-transfer-config") == '{"backend": "r1reward_gloo"}'
    assert value(words, "--host") == "127.0.0.1", "never on the network unless asked"
    assert "--no-enable-prefix-caching" not in words
    assert "--no-enable-prefix-caching" in command(section, weight_transfer="gloo", in_flight=True)
    assert value(words, "--allowed-local-media-path") == "/data"
    assert value(words, "--mm-processor-kwargs") == '{"min_pixels": 3136, "max_pixels": 50176}'
    assert value(words, "--kv-cache-memory-bytes") == str(1 << 27)
    assert value(words, "--middleware").endswith("BearerGuard"), "no route without the token"
    assert "--trust-remote-code" not in words
    assert value(words, "--generation-config") == "vllm", "no sampling defaults from the checkpoint"
    assert {"--enforce-eager", "--enable-scale-out", "--no-enable-chunked-prefill", "--fork-engine-core"} <= set(words)
    assert words[-2:] == ["--seed", "3"], "the user has the last word"


def test_a_scalar_reward_model_gets_the_pooling_route(tmp_path: Path) -> None:
    """No route that generates, and readiness is a reward."""
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2_5_VLForSequenceClassification"]}')
    words = server_command(ServerSection(), model_path=tmp_path, port=8123, served_name="rm", on_cpu=True)
    assert value(words, "--runner") == "pooling"
    assert not {"--enable-scale-out", "--logprobs-mode", "--generation-config"} & set(words)
    assert value(words, "--middleware").endswith("BearerGuard")
    path, body = first_request("rm", scalar=True)
    assert (path, body["model"], body["use_activation"]) == ("/classify", "rm", False)
    assert first_request(None, scalar=False)[0] == "/v1/completions"


def test_the_coldest_temperature_is_vllms() -> None:
    """It samples at that instead of anything lower, so `rl` refuses what the trainer would not share. Read, not run:
    importing vLLM takes seconds."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "sampling_params.py").read_text()
    assert f"_MAX_TEMP = {float(COLDEST):.0e}".replace("e-0", "e-") in source
    assert "self.temperature = max(self.temperature, _MAX_TEMP)" in source


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--dtype", "float16"), "extra_args sets --dtype, which follows from other keys"),
        (("--max_model_len=99",), "extra_args sets --max_model_len, which follows"),
        (("-tp", "2"), "extra_args sets -tp, which follows"),
        (("--generation-config", "auto"), "extra_args sets --generation-config, which follows"),
        (("--logprobs-mode=raw_logits",), "extra_args sets --logprobs-mode, which follows"),
        (("--override-generation-config", '{"repetition_penalty": 1.1}'), "changes the distribution"),
        (("--logits-processors", "a:b"), "changes the distribution"),
    ],
)
def test_extra_arguments_do_not_undo_what_the_run_file_says(extra: tuple[str, ...], words: str) -> None:
    """vLLM takes the last of several, so sampling and trainer went apart without a word."""
    with pytest.raises(ValueError, match=words):
        command(ServerSection(extra_args=extra), weight_transfer="gloo")
    if "distribution" in words:  # of a judge they are the user's own business
        assert command(ServerSection(extra_args=extra))[-2:] == list(extra)


def test_command_of_a_judge_on_gpus() -> None:
    section = ServerSection(
        tensor_parallel_size=4, gpu_memory_utilization=0.5, quantization="fp8", trust_remote_code=True
    )
    words = command(section)
    assert value(words, "--quantization") == "fp8"
    assert "--trust-remote-code" in words
    assert value(words, "--tensor-parallel-size") == "4"
    assert value(words, "--gpu-memory-utilization") == "0.5"
    absent = {"--weight-transfer-config", "--allowed-local-media-path", "--enforce-eager", "--fork-engine-core"}
    assert absent.isdisjoint(words)


@pytest.mark.parametrize(("sampled", "mode"), [(False, "raw_logprobs"), (True, "processed_logprobs")])
def test_log_probs_are_of_the_model_or_of_what_was_sampled(sampled: bool, mode: str) -> None:
    assert value(command(ServerSection(), sampled_log_probs=sampled), "--logprobs-mode") == mode


def test_several_workers_that_take_weights_are_all_heard() -> None:
    """vLLM's own executor loses answers when a worker fails; a judge's weights never change."""
    section = ServerSection(tensor_parallel_size=2)
    assert value(command(section, weight_transfer="nccl"), "--distributed-executor-backend").endswith("Executor")
    assert "--distributed-executor-backend" not in command(section)
    assert "--distributed-executor-backend" not in command(ServerSection(), weight_transfer="nccl")


def test_the_engine_is_forked_only_without_openmp_threads() -> None:
    assert "--fork-engine-core" not in command(ServerSection(num_threads=2), on_cpu=True)
    assert "--fork-engine-core" in command(ServerSection(tensor_parallel_size=2), on_cpu=True)


def test_environment_hides_the_trainer_from_vllm() -> None:
    base = {"PATH": "/bin", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "OMP_NUM_THREADS": "8"}
    base |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment = server_environment(ServerSection(num_threads=2), token="secret", on_cpu=True, base=base)
    assert environment["PATH"] == "/bin"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(environment)
    assert not {"VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"} & set(environment)
    assert environment["R1REWARD_SERVER_TOKEN"] == "secret"
    pushed_to = server_environment(ServerSection(), token="t", developer_routes=True, gpu_ids=(2, 3), base=base)
    assert pushed_to["VLLM_SERVER_DEV_MODE"] == "1"
    assert pushed_to["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(("own", "expected"), [({}, "mmap_threshold"), ({"GLIBC_TUNABLES": "a=1"}, "a=1")])
def test_a_cpu_server_keeps_freed_memory_for_the_next_push(own: dict[str, str], expected: str) -> None:
    environment = server_environment(ServerSection(), token="t", developer_routes=True, on_cpu=True, base=own)
    assert expected in environment["GLIBC_TUNABLES"]
    assert "GLIBC_TUNABLES" not in server_environment(ServerSection(), token="t", on_cpu=True, base={})


def server_running(program: str, tmp_path: Path, **limits: float) -> VllmServer:
    """A server whose process runs `program` instead of vLLM."""
    (tmp_path / "config.json").write_text("{}")
    section = ServerSection.model_validate(limits)
    server = VllmServer(section, model_path=tmp_path, log_path=tmp_path / "logs" / "server.log", on_cpu=True)
    server._command = [sys.executable, "-c", program]
    return server


def test_a_server_that_dies_shows_the_cause_and_the_log(tmp_path: Path) -> None:
    program = "import sys; print('ValueError: no such model'); print('RuntimeError: engine failed'); sys.exit(3)"
    server = server_running(program, tmp_path)
    with pytest.raises(ServerError) as error:
        start_servers([server])
    message = str(error.value)
    assert "exit code 3): ValueError: no such model" in message, "the first error is the cause"
    assert "logs/server.log" in message
    assert "| RuntimeError: engine failed" in message
    assert server.pid is None, "stopped"


def test_the_cause_of_death_is_the_engines_last_error(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(
        "(APIServer pid=1) ERROR FileNotFoundError: an image of long ago\n"
        "(EngineCore pid=2) WARNING this can cause errors like OSError: too many files\n"
        "(EngineCore pid=2) ERROR RuntimeError: CPU Generator does not use offset\n"
        "(APIServer pid=1) ERROR EngineDeadError: see above\n"
        'nanobind: leaked 4 instances!\n - leaked instance of type "x"\n'
    )
    first, *tail = explain(log).splitlines()
    assert first == "RuntimeError: CPU Generator does not use offset"
    assert "EngineDeadError" in tail[-1]
    assert explain(log, start=log.stat().st_size).startswith("the log shows no error")


# (vLLM's file, words of its message there, what its user can do)
MENDABLE = [
    ("v1/worker/utils.py", "is less than desired GPU memory utilization ", "lower gpu_memory_utilization, or end"),
    ("v1/core/kv_cache_utils.py", "No available memory for the cache blocks. ", "raise gpu_memory_utilization (on a"),
    ("v1/core/kv_cache_utils.py", "cache is needed, which is larger than the available KV cache ", "or lower max_mod"),
    ("config/model.py", "is greater than the derived max_model_len (", "lower max_model_len to max_position_embed"),
]


@pytest.mark.parametrize(("file", "words", "fix"), MENDABLE)
def test_what_the_user_can_mend_is_said_with_our_keys(file: str, words: str, fix: str, tmp_path: Path) -> None:
    """And vLLM still says it in these words."""
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.submodule_search_locations is not None
    source = (Path(package.submodule_search_locations[0]) / file).read_text()
    assert words in re.sub(r'"\s*\n\s*f?"', "", source)
    log = tmp_path / "server.log"
    log.write_text(
        f"(EngineCore pid=2) ERROR 11-29 10:00:00 [core.py:1] ValueError: 3.2 GiB {words.strip()} 5.1 GiB. Do this.\n"
        "(EngineCore pid=2) ERROR RuntimeError: the engine did not start\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    first = explain(log).splitlines()[0]
    assert first.startswith(f"ValueError: 3.2 GiB {words.strip()}")
    assert fix in first


def test_a_server_without_room_says_which_key_to_change(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("(EngineCore pid=2) ERROR torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert "2.00 GiB: the model does not fit: raise tensor_parallel_size" in explain(log)
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(ServerError, match=r"killed by SIGKILL, which the kernel does when memory is used up: lower "):
        start_servers([server_running(program, tmp_path)])


def test_a_server_that_never_listens_times_out(tmp_path: Path) -> None:
    server = server_running(
        "import time; print('loading', flush=True); time.sleep(600)", tmp_path, startup_timeout_s=0.5
    )
    with pytest.raises(ServerError, match=r"not ready after 0\.5 s"):
        start_servers([server])
    assert not server.alive


@pytest.mark.slow
def test_stop_ends_the_whole_process_group(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    server = server_running(program, tmp_path)
    server.start()
    child = psutil.Process(int(first_line(server.log_path)))
    server.stop()
    server.stop()  # harmless
    child.wait(120)


def test_a_taken_port_is_left_to_its_owner(tmp_path: Path) -> None:
    """Another process took the port between reservation and start; it even answers HTTP."""
    program = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
    do_GET = do_POST = answer
class Server(http.server.HTTPServer):
    allow_reuse_address = True
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
    server = server_running("", tmp_path)
    taken = server.port
    intruder = subprocess.Popen([sys.executable, "-c", program, str(taken)])
    wait_until(lambda: answers(taken))

    def reserve_and_run(self: VllmServer = server) -> None:
        VllmServer._reserve_port(self)
        self._command = [sys.executable, "-c", program, str(self.port)]

    server._command = [sys.executable, "-c", program, str(taken)]
    server._reserve_port = reserve_and_run  # type: ignore[method-assign]
    lines: list[str] = []
    try:
        server.start()
        process = server._process
        assert process is not None
        process.wait(120)  # it dies; the owner of the port goes on answering
        server.wait_ready(lines.append)
        assert server.port != taken
        assert f"port {taken} is taken by another process" in lines[0]
        assert answers(server.port)
    finally:
        server.close()
        intruder.kill()
        intruder.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_restart_ends_a_hanging_process_and_keeps_the_port(tmp_path: Path) -> None:
    server = server_running("import os, time; print(os.environ['TMPDIR'], flush=True); time.sleep(600)", tmp_path)
    port = server.port
    server.start()
    scratch = Path(first_line(server.log_path))
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    server.restart()
    assert server.port == port
    assert not psutil.pid_exists(first)
    assert not scratch.exists(), "temporary files of the killed process"
    server.close()
    with pytest.raises(ServerError, match="is closed"):
        server.start()


def test_two_servers_never_get_one_port(tmp_path: Path) -> None:
    servers = [server_running("", tmp_path) for _ in range(20)]
    assert len({server.url for server in servers}) == 20


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json: give a Hugging Face checkpoint folder"):
        VllmServer(ServerSection(), model_path=tmp_path, log_path=tmp_path / "log")


def test_banned_ids_are_vision_specials_and_padding(tiny_folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    banned = banned_token_ids(tiny_folder)
    assert banned >= set(tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|video_pad|>"]))
    assert tokenizer.eos_token_id not in banned
    assert all(token_id in banned for token_id in range(len(tokenizer), max(banned) + 1))


def first_line(path: Path) -> str:
    wait_until(lambda: path.read_text().endswith("\n"))
    return path.read_text().splitlines()[0]
