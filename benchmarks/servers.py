"""Models and servers of a chosen size for the benchmarks of rollout and weight push."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.demo.tiny_models import TinySpec, write_tiny_checkpoint

CORPUS = ["You are an impartial evaluator.", "<think>Response 1 is better.</think><answer>1</answer>", "0 1 2 3"] * 4
SECTION = ServerSection(
    dtype="float32", max_model_len=1024, max_num_seqs=64, kv_cache_bytes=1 << 28, push_timeout_s=300.0
)


def write_model(folder: Path, *, hidden_size: int, num_layers: int) -> Path:
    """A random Qwen2.5-VL; its size is about 4 bytes * 12 * num_layers * hidden_size^2."""
    if not (folder / "config.json").exists():
        heads = hidden_size // 32
        spec = TinySpec(
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_layers=num_layers,
            num_heads=heads,
            num_key_value_heads=max(heads // 2, 2),
        )
        write_tiny_checkpoint(folder, corpus=CORPUS, spec=spec, init_std=0.02)
    return folder


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensors."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total
