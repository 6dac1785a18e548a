"""One rank of a small run that measures its own memory, in a process of its own (planner_error.py starts it).

On a CPU the allocator's events (torch.profiler) give live bytes exactly; on a GPU `torch.cuda` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.shape import read_shape
from megatron_r1reward.parallel import setup
from megatron_r1reward.planner.memory import Numerics, stage_activations, state_bytes
from megatron_r1reward.planner.parameters import stage_tensors
from megatron_r1reward.planner.planned_layout import trainer_layout
from megatron_r1reward.planner.workload import MicroBatch
from megatron_r1reward.training.schedule import train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.types import Prompt, Sequence

SEQUENCES, PROMPT, RESPONSE, IMAGE = 4, 300, 60, (196, 140)  # tokens without the image; pixels


def _sequences(state: TrainState, folder: Path) -> list[Sequence]:
    """Random text of unequal lengths, each sequence with an image of its own: shared images are encoded once."""
    generator = np.random.default_rng(0)
    folder = folder / f"images-{state.topology.rank}"
    folder.mkdir()
    sequences = []
    for index in range(SEQUENCES):
        path = folder / f"{index}.png"
        Image.fromarray(generator.integers(0, 255, (IMAGE[1], IMAGE[0], 3), dtype=np.uint8)).save(path)
        length = PROMPT - 20 * index
        tokens = [int(t) for t in generator.integers(20, 250, length + RESPONSE)]
        prompt = Prompt(
            id=str(index),
            preference_id=str(index),
            token_ids=(state.packer.image_token_id, *tokens[:length]),
            image_paths=(str(path),),
            label=1,
            swapped=False,
        )
        sequences.append(state.packer.sequence(prompt, tokens[length:]))
    return sequences


def _state(state: TrainState) -> dict[str, int]:
    """Bytes of weights, gradient buffers and optimizer state, each storage once."""
    models = state.model if isinstance(state.model, list) else [state.model]
    weights = {p.untyped_storage().data_ptr(): p for model in models for p in model.parameters()}
    buffers = [b for model in models for b in (*model.buffers, *model.expert_parallel_buffers)]
    # a distributed optimizer moves the weights into one padded buffer: count the values, not the padding
    total = sum(p.nbytes for model in models for p in model.parameters())
    optimizer: dict[int, int] = {}
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        groups = part.optimizer.param_groups
        tensors = [t for values in part.optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
        masters = [p for group in groups for p in group["params"] if p.untyped_storage().data_ptr() not in weights]
        optimizer |= {id(t): t.nbytes for t in (*tensors, *masters) if t.numel() > 1}
    return {
        "parameters": total,
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": sum(optimizer.values()),
    }


@contextmanager
def _saved_by_forward(state: TrainState, found: dict[int, int]) -> Iterator[None]:
    """Collect the storages that autograd keeps while the model's forward runs, weights left out."""
    modules = state.modules if hasattr(state, "modules") else [state.module]
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept = []  # holds the tensors, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    contexts: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        contexts.append(saved_tensors_hooks(pack, lambda tensor: tensor))
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__()

    handles = [h for m in modules for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class AllocatorPeak:
    """Bytes allocated above those at the start, at their highest."""

    bytes = 0

    def __enter__(self) -> AllocatorPeak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
            )
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profiler.__exit__(*error)
        results = self._profiler.profiler.kineto_results  # type: ignore[union-attr]
        events = [e for e in results.events() if e.name() == "[memory]"]
        live = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            self.bytes = max(self.bytes, live)


def _planned(config: RunConfig, state: TrainState, sequences: list[Sequence], micro_batches: int) -> dict[str, float]:
    """What the planner says about exactly this rank, batch and number of micro-batches."""
    topology = state.topology
    shape = read_shape(json.loads((config.model.path / "config.json").read_text()))
    layout = trainer_layout(shape, config.parallel, topology.world_size)
    stage = topology.pipeline_parallel_rank
    numerics = Numerics(width=4 if config.model.precision == "fp32" else 2, fused_norm=torch.cuda.is_available())
    frozen = frozenset({"vision tower", "vision merger"}) if config.model.freeze_vision else frozenset()
    held = state_bytes(stage_tensors(shape, layout, stage), layout, numerics.width, frozen)
    images = state.packer.image_processor(sequences[0].image_paths[0])
    batch = MicroBatch(
        name="measured",
        tokens=sum(len(s.token_ids) for s in sequences),
        sequences=len(sequences),
        patches=len(images.pixel_values) * len(sequences),
        responses=sum(s.response_length for s in sequences),
        longest=len(sequences[0].token_ids),
    )

    def activations(count: int) -> Any:
        return stage_activations(shape, layout, numerics, batch, stage=stage, micro_batches=count, frozen=frozen)

    return {
        **{name: float(size) for name, size in asdict(held).items()},
        "saved by one forward": activations(1).language + activations(1).vision,
        "peak of a step": activations(micro_batches).total,
    }


def measure(run_file: Path, micro_batches: int) -> dict[str, Any]:
    """Measured and planned bytes of this rank of a run."""
    config = load_config(run_file)
    topology = setup.initialize(config.parallel, seed=0)
    state = build_state(config, topology, optimizer_steps=10)
    sequences = _sequences(state, run_file.parent)
    one = [list(range(SEQUENCES))]
    train_micro_batches(state, sequences, one, cross_entropy)  # allocates the optimizer state and every buffer
    saved: dict[int, int] = {}
    with _saved_by_forward(state, saved):
        train_micro_batches(state, sequences, one, cross_entropy)
    with AllocatorPeak() as peak:
        train_micro_batches(state, sequences, one * micro_batches, cross_entropy)
    return {
        "rank": topology.rank,
        "planned": _planned(config, state, sequences, micro_batches),
        "measured": {**_state(state), "saved by one forward": sum(saved.values()), "peak of a step": peak.bytes},
    }
