"""How one vLLM server is called: its command line, its environment, and what these must know of the machine: without
the seconds that torch takes to import where there is no GPU.

Rollout servers (token ids in and out, weight transfer), judges (plain OpenAI chat) and scalar reward models (vLLM's
pooling route) alike.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_r1reward.cluster.visible_gpus import VARIABLE, names_of
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.model_folder.shape import Family, ModelShape, Yarn, load_shape
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.servers.vllm_main import FORK_FLAG

WeightTransport = Literal["gloo", "nccl", "ipc"]

# Names under which our receivers are registered inside vLLM; "nccl" and "ipc" are vLLM's own, which pickle.
RECEIVERS: Mapping[WeightTransport, str] = {"gloo": "r1reward_gloo", "nccl": "r1reward_nccl", "ipc": "r1reward_ipc"}
EXPERTS_LOAD_FORMAT = "r1reward_experts"  # likewise
GUARD = "megatron_r1reward.network.guard.BearerGuard"
EXECUTOR = "megatron_r1reward.servers.vllm_executor.WholeAnswerExecutor"

# The trainer's own distributed set-up, which vLLM's workers would take for theirs, and what would weaken a server.
_HIDDEN_VARIABLES = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
    "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE", "VLLM_API_KEY",
})  # fmt: skip
_MIN_BATCHED_TOKENS = 8192
_SHORT = {"-tp": "--tensor-parallel-size", "-q": "--quantization"}  # of the options that are set here
_FOLLOW_FROM_KEYS = frozenset({
    "--model", "--served-model-name", "--host", "--port", "--middleware", "--dtype", "--tensor-parallel-size",
    "--max-model-len", "--max-num-seqs", "--generation-config", "--logprobs-mode", "--quantization",
    "--gpu-memory-utilization", "--weight-transfer-config", "--allowed-local-media-path", "--mm-processor-kwargs",
})  # fmt: skip
_CHANGE_SAMPLING = ("--override-generation-config", "--logits-processors", "--logits-processor-pattern")
# vLLM's MRotaryEmbedding computes YaRN as of this many times the original length, for a longer table of sines. That
# length enters the frequencies by length / beta only: with as many times larger betas they are right to the last bit.
_POSITIONS_FACTOR: Mapping[Family, int] = {"qwen2_5_vl": 4, "qwen3_vl": 1, "qwen3_vl_moe": 1}
# glibc gives large blocks back to the kernel when they are freed. A weight push frees and allocates every layer, and
# faulting all its pages in again takes longer than the transfer: keep them for the next push.
_KEEP_FREED_MEMORY = "glibc.malloc.mmap_threshold=1099511627776:glibc.malloc.trim_threshold=1099511627776"


def has_driver() -> bool:
    """Whether NVIDIA's driver is here; CUDA loads its library by this name."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def sees_gpu() -> bool:
    """`torch.cuda.is_available()`, which is False for sure without the driver."""
    if "torch" not in sys.modules and not has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def weight_transport(section: ServerSection, *, colocated: bool = False) -> WeightTransport:
    """`section.weight_transport`, "auto" resolved: nccl where this process sees a GPU of its own, else gloo.

    Raises:
        ValueError: nccl between two processes on one GPU, which it refuses.
    """
    if colocated and section.weight_transport == "nccl":
        raise ValueError(
            "rollout.weight_transport 'nccl' cannot reach servers on the trainer's own GPUs (cluster.layout "
            "'colocated'): use 'auto', 'gloo', or 'ipc' with one GPU"
        )
    if section.weight_transport != "auto":
        return section.weight_transport
    return "nccl" if not colocated and sees_gpu() else "gloo"


def server_command(
    section: VllmSection,
    *,
    model_path: Path,
    port: int,
    served_name: str,
    host: str = "127.0.0.1",
    on_cpu: bool = False,
    weight_transfer: WeightTransport | None = None,
    media_root: Path | None = None,
    pixels: tuple[int, int] | None = None,
    sleep_mode: bool = False,
    in_flight: bool = False,
    sampled_log_probs: bool = False,
) -> list[str]:
    """The command that runs one server.

    Args:
        model_path: HF checkpoint folder.
        served_name: what requests call the model.
        weight_transfer: transport of weight pushes; None for a server whose weights never change (a judge).
        media_root: folder below which requests may name images as file:// URLs; None forbids it.
        pixels: (min_pixels, max_pixels) of the image processor, which must be the trainer's; None: the checkpoint's.
        sampled_log_probs: return log-probs of the distribution that tokens are drawn from (tempered, banned ids left
            out); False: of the raw softmax. docs/numerics.md has the contract.
        in_flight: pushes come while requests are being sampled; without it they had better not.
        sleep_mode: allocate GPU memory such that /sleep can free it (colocated servers); a CPU has no such thing.
    """
    command = [sys.executable, "-m", "megatron_r1reward.servers.vllm_main"]
    if _forks_engine_core(section, on_cpu):
        command += [FORK_FLAG]
    command += ["--model", str(model_path), "--served-model-name", served_name, "--host", host, "--port", str(port)]
    command += ["--middleware", GUARD]
    command += ["--dtype", section.dtype, "--tensor-parallel-size", str(section.tensor_parallel_size)]
    command += ["--max-model-len", str(section.max_model_len), "--max-num-seqs", str(section.max_num_seqs)]
    command += _route_options(model_path, sampled_log_probs)
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
        if sleep_mode:
            command += ["--enable-sleep-mode"]
    if section.quantization is not None:
        command += ["--quantization", section.quantization]
    if section.trust_remote_code:
        command += ["--trust-remote-code"]
    if weight_transfer is not None:
        command += ["--weight-transfer-config", json.dumps({"backend": RECEIVERS[weight_transfer]})]
        if section.tensor_parallel_size > 1:
            command += ["--distributed-executor-backend", EXECUTOR]
    if in_flight:
        # vLLM does not give its worker the image of a request whose image lies in a cached prefix, as of the second
        # sample of a prompt. A push clears the cache; to go on, the worker needs the image, and the engine dies.
        command += ["--no-enable-prefix-caching"]
    if media_root is not None:
        command += ["--allowed-local-media-path", str(media_root.resolve())]
    if pixels is not None:
        command += ["--mm-processor-kwargs", json.dumps({"min_pixels": pixels[0], "max_pixels": pixels[1]})]
    corrections = model_corrections(model_path, section)
    _check_extra_args(section.extra_args, corrections, model_path, trained=weight_transfer is not None)
    return [*command, *(word for option in corrections.items() for word in option), *section.extra_args]


def _route_options(model_path: Path, sampled_log_probs: bool) -> list[str]:
    """What makes the routes that are asked: /classify of a scalar reward model, whose head is in `vllm_scalar`; else
    completions and /inference/v1/generate (token ids in, token ids out)."""
    if is_scalar_folder(model_path):
        return ["--runner", "pooling"]
    # Sampling parameters come from requests only; "auto" would add the checkpoint's generation_config.json.
    logprobs = "processed_logprobs" if sampled_log_probs else "raw_logprobs"
    return ["--generation-config", "vllm", "--enable-scale-out", "--logprobs-mode", logprobs]


def _check_extra_args(extra: Sequence[str], corrections: Mapping[str, str], folder: Path, *, trained: bool) -> None:
    """vLLM takes the last of several: an option that is set already would undo what the run file says."""
    given = {_option(word): word.partition("=")[0] for word in extra if word.startswith("-")}
    if double := [given[option] for option in given if option in corrections]:
        raise ValueError(
            f"extra_args sets {', '.join(double)}, which vLLM is given already to compute {folder} as the trainer "
            "does: remove it"
        )
    if double := [word for option, word in given.items() if option in _FOLLOW_FROM_KEYS]:
        raise ValueError(
            f"extra_args sets {', '.join(double)}, which follows from other keys of the run file: remove it, and set "
            "the key (docs/run-files.md)"
        )
    if trained and (changed := [word for option, word in given.items() if option in _CHANGE_SAMPLING]):
        raise ValueError(
            f"extra_args sets {', '.join(changed)}, which changes the distribution that responses are drawn from, and "
            "the trainer's knows nothing of it: remove it"
        )


def _option(word: str) -> str:
    """An option's one name among its spellings: "--no-enable_x=..." and "--enable-x" are the same."""
    name = word.partition("=")[0]
    return _SHORT.get(name, "--" + name.removeprefix("--").replace("_", "-").removeprefix("no-"))


def model_corrections(folder: Path, section: VllmSection) -> dict[str, str]:
    """Options without which vLLM 0.32 reads or computes a folder in another way than transformers and the trainer do:
    option -> value. None for models that are not of our families.

    Raises:
        ValueError: with them, vLLM could not serve sequences of `max_model_len`.
    """
    try:
        shape = load_shape(folder)
        transposed = shape.text.experts is not None and read_folder_weights(folder).has_transposed_experts
    except (ValueError, OSError):  # of another family; or damaged, which is said before servers start
        return {}
    found = {}
    if (yarn := shape.text.rope.yarn) is not None:
        _check_length(section.max_model_len, yarn, shape, folder)
        if (factor := _POSITIONS_FACTOR[shape.family]) != 1:
            betas = {"beta_fast": factor * yarn.beta_fast, "beta_slow": factor * yarn.beta_slow}
            found["--hf-overrides"] = json.dumps({"text_config": {"rope_parameters": betas}})
    if transposed:
        found["--load-format"] = EXPERTS_LOAD_FORMAT
    return found


def _check_length(max_model_len: int, yarn: Yarn, shape: ModelShape, folder: Path) -> None:
    """vLLM's table of sines ends there, and its engine with the first request that is longer."""
    positions = int(_POSITIONS_FACTOR[shape.family] * yarn.factor * yarn.original_positions)
    if max_model_len > positions:
        raise ValueError(
            f"max_model_len {max_model_len} is more than the {positions} positions that the YaRN scaling of {folder} "
            f"reaches ({yarn.factor:g} times {yarn.original_positions}): lower max_model_len, or raise its factor"
        )


def server_environment(
    section: VllmSection,
    *,
    token: str,
    developer_routes: bool = False,
    on_cpu: bool = False,
    gpu_ids: Sequence[int] = (),
    base: Mapping[str, str],
) -> dict[str, str]:
    """The server's environment: `base` without the trainer's distributed variables, plus what vLLM needs.

    Args:
        token: every request must carry it as a bearer token (`network.guard.BearerGuard`).
        developer_routes: open /pause, /resume, weight transfer and cache resets, to bearers of the token.
    """
    environment = {name: value for name, value in base.items() if name not in _HIDDEN_VARIABLES}
    environment |= {
        TOKEN_VARIABLE: token,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # clients keep connections between steps
        "HF_HUB_OFFLINE": "1",  # models are folders; a missing file is an error, not a download
    }
    if developer_routes:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        if on_cpu:
            environment.setdefault("GLIBC_TUNABLES", _KEEP_FREED_MEMORY)
    if on_cpu:
        environment |= {
            "OMP_NUM_THREADS": str(section.num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" would put every server of a machine on the same cores
            "TORCH_COMPILE_DISABLE": "1",  # otherwise the sampler is compiled at the first request: a minute
        }
        if section.tensor_parallel_size == 1:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker lives in the engine's process
    if gpu_ids:
        environment[VARIABLE] = names_of(gpu_ids, base)
    return environment


def _forks_engine_core(section: VllmSection, on_cpu: bool) -> bool:
    return on_cpu and section.num_threads == 1
