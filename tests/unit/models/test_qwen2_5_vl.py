"""The Megatron model against transformers on the same folder, images and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_r1reward.checkpoint.hf_model_io import HfReader, load_hf_weights
from megatron_r1reward.checkpoint.weight_exporter import export_hf_tensors
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.models.qwen2_5_vl.config import build_configs
from megatron_r1reward.models.qwen2_5_vl.model import Qwen25VL
from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions
from megatron_r1reward.models.registry import weight_table
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import PackedBatch, Prompt, Sequence


@pytest.fixture(scope="module")
def topology():
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def model(tiny_folder: Path, topology: setup.Topology) -> Qwen25VL:
    config = Qwen2_5_VLConfig.from_pretrained(tiny_folder)
    built = Qwen25VL(build_configs(config, ParallelSection(), torch.float32), topology)
    load_hf_weights(built, tiny_folder, weight_table(config))
    return built


@pytest.fixture(scope="module")
def packer(tiny_folder: Path) -> Packer:
    config = Qwen2_5_VLConfig.from_pretrained(tiny_folder)
    return Packer(
        image_processor=ImageProcessor(tiny_folder, min_pixels=3136, max_pixels=28 * 28 * 64),
        image_token_id=config.image_token_id,
        positions=mrope_positions,
        pad_token_id=0,
        token_budget=4096,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def sequences(tiny_folder: Path, packer: Packer, image_paths: tuple[str, ...]) -> list[Sequence]:
    """Text only, one image, two images of different shapes; responses of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    built = []
    for number, paths in enumerate([(), image_paths[:1], image_paths[1:]]):
        content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": f"Which digit is shown? {number}"}]
        token_ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        prompt = Prompt(
            id=str(number), preference_id=str(number), token_ids=tuple(token_ids), image_paths=paths, label=1,
            swapped=False,
        )  # fmt: skip
        response = tokenizer.encode(f"<think>The image shows {number}.</think><answer>1</answer>" * (number + 1))
        built.append(packer.sequence(prompt, response))
    return built


def hf_log_probs(
    folder: Path, sequences: list[Sequence], packer: Packer, *, with_images: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Response log-probs one sequence at a time (no packing), and gradients of their sum."""
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    collected = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        images = [packer.image_processor(path) for path in sequence.image_paths]
        inputs = {}
        if images:
            inputs = {
                "pixel_values": torch.cat([image.pixel_values for image in images]),
                "image_grid_thw": torch.tensor([image.grid for image in images]),
                "mm_token_type_ids": (ids == packer.image_token_id).int(),
            }
        logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
        log_probs = torch.log_softmax(logits[sequence.prompt_length - 1 : -1].float(), dim=-1)
        collected.append(log_probs.gather(1, ids[0, sequence.prompt_length :, None])[:, 0])
    log_probs_R = torch.cat(collected)
    log_probs_R.sum().backward()
    return log_probs_R.detach(), {n: p.grad for n, p in reference.named_parameters()}


def test_log_probs_agree_with_transformers_on_a_packed_batch(tiny_folder, model, packer, sequences):
    expected, _ = hf_log_probs(tiny_folder, sequences, packer)
    log_probs, entropy = model(packer.pack(sequences, [0, 1, 2]))
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5, "the reference must be far from uniform for this test to mean anything"
    assert (entropy > 0).all()


def test_gradients_agree_with_transformers(tiny_folder, model, packer, sequences, topology):
    _, expected = hf_log_probs(tiny_folder, sequences, packer)
    model.zero_grad()
    model(packer.pack(sequences, [0, 1, 2]))[0].sum().backward()
    config = model.hf
    gradients = {}
    parameters = dict(model.named_parameters())
    for entry in weight_table(config):
        gradients.update(zip(entry.hf, entry.layout.split(parameters[entry.megatron].grad), strict=True))
    for name, gradient in gradients.items():
        hf_name = name.replace("visual.", "model.visual.") if name.startswith("visual.") else name
        hf_name = hf_name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else hf_name
        scale = expected[hf_name].abs().max()
        torch.testing.assert_close(gradient, expected[hf_name], atol=float(1e-4 * scale) + 1e-6, rtol=1e-3, msg=name)


def test_the_policy_sees_the_image(model, packer, sequences, image_paths):
    """log_prob(with image) != log_prob(with another image) != log_prob(without pixels)."""
    batch = packer.pack(sequences, [1])
    seen = model(batch)[0]
    other = Sequence(
        token_ids=sequences[1].token_ids, prompt_length=sequences[1].prompt_length, image_paths=image_paths[:1]
    )
    assert torch.equal(seen, model(packer.pack([other], [0]))[0]), "same input, same result"
    changed = PackedBatch(**{**batch.__dict__, "pixel_values": batch.pixel_values.flip(0)})
    blind = PackedBatch(**{**batch.__dict__, "pixel_values": None, "image_grid_thw": None})
    assert (model(changed)[0] - seen).abs().max() > 1e-2
    assert (model(blind)[0] - seen).abs().max() > 1e-2


def test_packing_does_not_change_log_probs(model, packer, sequences):
    together = model(packer.pack(sequences, [0, 1, 2]))[0]
    apart = torch.cat([model(packer.pack(sequences, [i]))[0] for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_export_returns_every_tensor_of_the_folder_unchanged(tiny_folder, model, topology):
    reader = HfReader(tiny_folder)
    exported = dict(export_hf_tensors(model, weight_table(model.hf), topology))
    assert set(exported) == set(reader.files)
    for name, tensor in exported.items():
        assert torch.equal(tensor, reader[name]), name
