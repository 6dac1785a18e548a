"""Tiny members of the model families, sequences for them, and what transformers says about those."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from megatron_r1reward.checkpoint.hf_model_io import load_hf_weights
from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.demo.tiny_models import TINY_SPECS, TinyQwen3Spec, TinySpec
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.types import PackedBatch, Prompt, Sequence

# Four decoder layers and three deepstack levels: the third crosses a stage boundary when there are two.
DEEP = TinyQwen3Spec(num_layers=4, vision_depth=4, deepstack_blocks=(0, 1, 2))
DEEP_MOE = replace(DEEP, num_experts=8, mlp_only_layers=(2,))
MEMBERS: dict[str, TinySpec | TinyQwen3Spec] = {
    "qwen2_5_vl": TINY_SPECS["qwen2_5_vl"],
    "qwen2_5_vl tied": TinySpec(tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3_vl": DEEP,
    "qwen3_vl tied": replace(DEEP, tie_word_embeddings=True, num_key_value_heads=1, deepstack_blocks=(2, 0)),
    "qwen3_vl_moe": DEEP_MOE,
}


@dataclass(frozen=True)
class Member:
    """One tiny checkpoint folder."""

    folder: Path

    @cached_property
    def config(self) -> Any:
        return load_hf_config(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def packer(self) -> Packer:
        return Packer(
            image_processor=ImageProcessor(self.folder, min_pixels=3136, max_pixels=32 * 32 * 64),
            image_token_id=self.config.image_token_id,
            positions=family_of(self.config).positions,
            pad_token_id=0,
            token_budget=4096,
            device=torch.device("cpu"),
        )

    def build(self, topology: Topology) -> torch.nn.Module:
        family = family_of(self.config)
        configs = family.build_configs(self.config, ParallelSection(), torch.float32, PrecisionSection(), MoeSection())
        model = family.build_model(configs, topology)
        load_hf_weights(model, self.folder, family.weight_table(self.config))
        return model

    def sequence(self, number: int, image_paths: tuple[str, ...]) -> Sequence:
        """Images and a question, and a response whose length grows with `number`."""
        content = [{"type": "image"} for _ in image_paths]
        content.append({"type": "text", "text": f"Which digit is shown? {number}"})
        token_ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        prompt = Prompt(
            id=str(number), preference_id=str(number), token_ids=tuple(token_ids), image_paths=image_paths, label=1,
            swapped=False,
        )  # fmt: skip
        response = f"<think>The image shows {number}.</think><answer>1</answer>" * (number + 1)
        return self.packer.sequence(prompt, self.tokenizer.encode(response))


def scale_with_yarn(folder: Path, factor: float = 4.0, original: int = 256) -> None:
    """Give the checkpoint's configuration YaRN: `factor` times `original` positions."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    tree["text_config"]["rope_parameters"] |= scaling
    tree["text_config"]["max_position_embeddings"] = int(factor * original)
    path.write_text(json.dumps(tree))


def transpose_experts(file: Path) -> None:
    """Stack the experts of a published checkpoint as transformers' modules do and save them: [E, out, in]."""
    tensors = load_file(file)
    experts = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name}
    assert experts
    save_file(tensors | experts, file, metadata={"format": "pt"})


def odd_images(folder: Path) -> tuple[str, ...]:
    """Images whose grids have odd numbers of merged patches, and shapes far from square."""
    generator = np.random.default_rng(1)
    paths = []
    for width, height in ((96, 160), (224, 32), (33, 290)):
        path = folder / f"{width}x{height}.png"
        small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return tuple(paths)


def reference_model(member: Member) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(member.folder, dtype=torch.float32)


def reference_log_probs(model: torch.nn.Module, member: Member, sequence: Sequence) -> torch.Tensor:
    """transformers' log-probs of the response, [R], from this one unpacked sequence."""
    ids = torch.tensor([sequence.token_ids])
    images = [member.packer.image_processor(path) for path in sequence.image_paths]
    inputs = {}
    if images:
        inputs = {
            "pixel_values": torch.cat([image.pixel_values for image in images]),
            "image_grid_thw": torch.tensor([image.grid for image in images]),
            "mm_token_type_ids": (ids == member.config.image_token_id).int(),
        }
    return response_log_probs(model, ids, sequence.prompt_length, inputs)


def response_log_probs(
    model: torch.nn.Module, ids: torch.Tensor, prompt_length: int, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
    log_probs = torch.log_softmax(logits[prompt_length - 1 : -1].float(), dim=-1)
    return log_probs.gather(1, ids[0, prompt_length:, None])[:, 0]


def reference_gradients(model: torch.nn.Module, member: Member) -> dict[str, torch.Tensor]:
    """Gradients of a transformers model under the names and in the layout of the checkpoint folder."""
    table = family_of(member.config).weight_table(member.config)
    return {
        table.canonical(name): p.grad.transpose(1, 2) if ".mlp.experts." in name else p.grad
        for name, p in model.named_parameters()
    }


def exported_gradients(model: torch.nn.Module, member: Member) -> dict[str, torch.Tensor]:
    """Gradients of a one-rank Megatron model under Hugging Face names; those of stacked experts stacked."""
    parameters = dict(model.named_parameters())
    parts: dict[str, list[torch.Tensor]] = {}
    for entry in family_of(member.config).weight_table(member.config):
        for name, part in zip(entry.hf, entry.layout.split(parameters[entry.megatron].grad), strict=True):
            parts.setdefault(name, []).append(part)
    return {name: torch.stack(p) if ".mlp.experts." in name else p[0] for name, p in parts.items()}


def video_batch(
    member: Member, frames: SequenceOf[torch.Tensor], grid: tuple[int, int, int], ids: list[int], prompt_length: int
) -> PackedBatch:
    """A batch of one sequence with one video, given frame by frame; `ids` hold the expanded video placeholders."""
    _, rows, columns = grid
    positions = family_of(member.config).positions
    pixel_values = torch.cat(list(frames))
    response = torch.arange(prompt_length, len(ids))
    tokens = [member.config.image_token_id if i == member.config.video_token_id else i for i in ids]
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=positions(
            tokens,
            [(1, rows, columns)] * len(frames),
            image_token_id=member.config.image_token_id,
            merge_size=2,
        )[:, None],
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        bounds=(0, len(ids)),
        response_positions=response - 1,
        targets=torch.tensor(ids[prompt_length:]),
        response_sequence=torch.zeros(len(response), dtype=torch.int64),
        sequence_indices=(0,),
        pixel_values=pixel_values,
        image_grid_thw=torch.tensor([(1, rows, columns)] * len(frames)),
    )


def offsets(sequences: SequenceOf[Sequence]) -> list[int]:
    return [0, *itertools.accumulate(sequence.response_length for sequence in sequences)]
