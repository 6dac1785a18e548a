"""A model and a batch in the proportions of real training, small enough for a CPU.

The model keeps the ratios of Qwen2.5-VL-3B: the LM head has about a tenth of the decoder's parameters, the vision tower
about a quarter. Prompts hold one image and a long text, responses are a third as long, samples of one prompt share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.demo.tiny_models import TinySpec, write_tiny_checkpoint
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.types import Prompt, Sequence

SPEC = TinySpec(num_layers=8, pad_vocab_to=1152, vision_depth=4, vision_full_attention_blocks=(3,))
CORPUS = ["Which of the two responses describes the picture better? 0 1 2 3 4 5 6 7 8 9"] * 4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many prompts and samples, and how long; `spread` varies every length by that share."""

    prompts: int
    samples: int
    image_side: int  # pixels
    text_tokens: int
    response_tokens: int
    spread: float = 0.5


def write_model(folder: Path) -> None:
    write_tiny_checkpoint(folder, corpus=CORPUS, init_std=0.05, spec=SPEC)


def build(folder: Path, budget: int, **sections: Any) -> TrainState:
    """A single process in float32."""
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(folder), "precision": "fp32"},
            "data": {"train": "unused", "token_budget": budget, "max_pixels": 28 * 28 * 256},
            "optimizer": {"lr": 1e-6, "warmup_fraction": 0.0, "schedule": "constant"},
            **sections,
        }
    )
    topology = setup.initialize(config.parallel, seed=0)
    return build_state(config, topology, optimizer_steps=1_000)


def sequences(state: TrainState, shape: Shape, images: Path) -> list[Sequence]:
    """prompts x samples sequences of random tokens, samples of one prompt next to each other."""
    images.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    start, pad, end = state.tokenizer.convert_tokens_to_ids(special)

    def tokens(length: int) -> list[int]:
        vary = 1 + shape.spread * generator.uniform(-1, 1)
        return generator.integers(0, 256, max(1, round(length * vary))).tolist()

    built = []
    for number in range(shape.prompts):
        path = images / f"{number}.png"
        pixels = generator.integers(0, 255, (shape.image_side, shape.image_side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        ids = (start, pad, end, *tokens(shape.text_tokens))
        prompt = Prompt(
            id=str(number), preference_id=str(number), token_ids=ids, image_paths=(str(path),), label=1, swapped=False
        )
        built += [state.packer.sequence(prompt, tokens(shape.response_tokens)) for _ in range(shape.samples)]
    return built


def median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def mean(values: list[float]) -> float:
    return float(torch.tensor(values).mean())
