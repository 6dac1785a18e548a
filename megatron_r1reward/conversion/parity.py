"""Does the converted model compute what transformers computes? Log-probs of one sample with an image, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from megatron_r1reward.checkpoint.dist import load_weights
from megatron_r1reward.checkpoint.hf_model_io import load_hf_weights
from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.conversion.weight_source import WeightSource
from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.model_folder.other_folder import is_distributed
from megatron_r1reward.models.base import on_device
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import Prompt, Sequence

QUESTION, ANSWER = "What is shown in this image?", "<think>A gradient with a bright corner.</think><answer>1</answer>"


def log_prob_difference(folder: Path, reference: Path | None = None) -> float:
    """Largest absolute log-prob difference over the answer's tokens, on one rank; the model must fit into memory twice.

    Args:
        folder: distributed checkpoint or Hugging Face folder, loaded into the Megatron model.
        reference: Hugging Face folder with weights, loaded by transformers; None: `folder` itself.

    Raises:
        ValueError: there is no Hugging Face folder to compare with.
    """
    source = WeightSource(folder, Sources(), without_values=True)
    if source.shape.score_layers:
        raise ValueError(f"{folder} is a scalar reward model, which has no log-probs: leave --log-probs out")
    if reference is None and source.is_distributed:
        raise ValueError(f"name the Hugging Face folder that {folder} is compared with: --against")
    hf_folder = reference or folder
    if not any(hf_folder.glob("*.safetensors")):
        raise ValueError(f"{hf_folder} holds no safetensors files to compare with")
    with tempfile.TemporaryDirectory() as images:
        packer, sequence = _sample(hf_folder, Path(images) / "sample.png")
        ours = _megatron(folder, hf_folder, packer, sequence)
        theirs = _transformers(hf_folder, packer, sequence)
    return float((ours - theirs).abs().max())


def _sample(hf_folder: Path, image: Path) -> tuple[Packer, Sequence]:
    config = load_hf_config(hf_folder)
    tokenizer = load_tokenizer(hf_folder)
    packer = Packer(
        image_processor=ImageProcessor(hf_folder, min_pixels=3136, max_pixels=28 * 28 * 256),
        image_token_id=config.image_token_id,
        positions=family_of(config).positions,
        pad_token_id=tokenizer.pad_token_id or 0,
        token_budget=1 << 20,
        device=setup.device_of(),
    )
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    rows, columns = np.mgrid[0:112, 0:168]
    pixels = np.stack([rows * 2, columns, (rows * columns) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(image)
    prompt = Prompt(
        id="sample",
        preference_id="sample",
        token_ids=tuple(tokenizer.encode(text, add_special_tokens=False)),
        image_paths=(str(image),),
        label=1,
        swapped=False,
    )
    return packer, packer.sequence(prompt, tokenizer.encode(ANSWER, add_special_tokens=False))


@torch.no_grad()
def _megatron(folder: Path, hf_folder: Path, packer: Packer, sequence: Sequence) -> torch.Tensor:
    topology = setup.initialize(ParallelSection(), seed=0)
    config = load_hf_config(hf_folder)
    family = family_of(config)
    configs = family.build_configs(config, ParallelSection(), torch.float32, PrecisionSection(), MoeSection())
    model = on_device(family.build_model(configs, topology), topology.device, torch.float32).eval()
    if is_distributed(folder):
        load_weights(folder, model)
    else:
        load_hf_weights(model, folder, family.weight_table(config))
    output: torch.Tensor = model(packer.pack([sequence], [0]))[0]
    setup.shutdown()
    return output.cpu()


@torch.no_grad()
def _transformers(hf_folder: Path, packer: Packer, sequence: Sequence) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32, local_files_only=True).eval()
    image = packer.image_processor(sequence.image_paths[0])
    ids = torch.tensor([sequence.token_ids])
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=image.pixel_values,
        image_grid_thw=torch.tensor([image.grid]),
        mm_token_type_ids=(ids == packer.image_token_id).int(),
    ).logits[0]
    log_probs = torch.log_softmax(logits[sequence.prompt_length - 1 : -1].float(), dim=-1)
    return log_probs.gather(1, ids[0, sequence.prompt_length :, None])[:, 0]
