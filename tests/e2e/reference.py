"""The settings of test servers, and what they should answer according to transformers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, PreTrainedTokenizerFast

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.data.image_files import decode
from megatron_r1reward.data.stage_data import SCALAR_TEMPLATE
from megatron_r1reward.model_folder.config_reader import CONFIG
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.model_folder.scalar_folder import scalar_config
from megatron_r1reward.model_folder.shape import load_shape
from megatron_r1reward.model_folder.weight_table import score_entries
from megatron_r1reward.network.server_api import tls
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.types import Prompt, Rollout, TensorMeta

PATIENCE_S = 600.0  # with a server on a busy machine; httpx's own is 5 s
SERVER = ServerSection(
    dtype="float32", max_model_len=1024, max_num_seqs=64, kv_cache_bytes=1 << 27, request_timeout_s=300.0,
    health_timeout_s=60.0, probe_timeout_s=120.0,
)  # fmt: skip


def with_scalar_head(folder: Path, out: Path, layers: int) -> Path:
    """A copy of a model folder with a random reward head of so many layers, as `r1reward rm` writes it."""
    shutil.copytree(folder, out)
    (out / CONFIG).write_text(scalar_config((out / CONFIG).read_text(), layers))
    (out / FILE).write_text(PromptPolicy(kind="scalar", template=SCALAR_TEMPLATE, orders="any").to_json())
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    for entry in score_entries(load_shape(out).text.hidden, layers):
        (shape,) = entry.shapes
        generator = torch.Generator().manual_seed(len(tensors))
        (name,) = entry.hf
        tensors[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


class Reference:
    """transformers' log-probabilities for rollouts of one checkpoint folder."""

    def __init__(self, folder: Path, **image_options: Any) -> None:
        self.folder = folder
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._images = AutoImageProcessor.from_pretrained(folder, **image_options)
        self._image_id = self.model.config.image_token_id

    @torch.no_grad()
    def redrawn(self, seed: int) -> Reference:
        """This reference, its model with other random matrices of the same scale."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
        return self

    def weights(self, *prefixes: str) -> tuple[list[TensorMeta], Iterator[tuple[str, torch.Tensor]]]:
        """The arguments of a push: all weights, or those whose name starts with one of `prefixes`."""
        tensors = {name: p for name, p in self.model.named_parameters() if name.startswith(prefixes or ("",))}
        return [TensorMeta.of(name, tensor) for name, tensor in tensors.items()], iter(tensors.items())

    def prompt(self, name: str, text: str, *image_paths: str) -> Prompt:
        images = "<|vision_start|><|image_pad|><|vision_end|>" * len(image_paths)
        chat = f"<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = tuple(self.tokenizer(chat)["input_ids"])
        return Prompt(id=name, preference_id=name, token_ids=ids, image_paths=image_paths, label=1, swapped=False)

    @torch.no_grad()
    def log_probs(self, rollout: Rollout) -> torch.Tensor:
        """float32 [T], T response tokens."""
        prompt, vision = self._expanded(rollout.prompt)
        ids = torch.tensor([[*prompt, *rollout.token_ids]])
        kinds = (ids == self._image_id).int()
        logits = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **vision
        ).logits
        log_probs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, ids[0, len(prompt) :, None])[:, 0]

    def _expanded(self, prompt: Prompt) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Prompt ids with one placeholder per merged patch, and the model's vision inputs."""
        if not prompt.image_paths:
            return list(prompt.token_ids), {}
        images = [decode(path) for path in prompt.image_paths]
        vision = dict(self._images(images=images, return_tensors="pt"))
        counts = iter((vision["image_grid_thw"].prod(-1) // 4).tolist())
        ids = [i for i in prompt.token_ids for _ in range(next(counts) if i == self._image_id else 1)]
        return ids, vision

    def error(self, rollout: Rollout) -> float:
        """Largest distance between the server's and transformers' log-probabilities."""
        return float((self.log_probs(rollout) - torch.tensor(rollout.log_probs)).abs().max())


def requests_running(pool: RolloutPool, number: int = 0) -> float:
    """Sequences that a server of the pool is sampling at this moment."""
    member = pool.group.members[number]
    metrics = httpx.get(
        f"{member.url}/metrics", headers=bearer(member.bearer_token), timeout=PATIENCE_S, verify=tls()
    ).text
    return sum(
        float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")
    )
