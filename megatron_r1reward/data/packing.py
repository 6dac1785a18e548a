"""Sequences to packed micro-batches: expand image placeholders, compute positions per sequence, then pack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from megatron_r1reward.data.images import ImageProcessor, ProcessedImage
from megatron_r1reward.models.registry import Positions
from megatron_r1reward.types import PackedBatch, Prompt, Sequence


def expand_images(token_ids: SequenceOf[int], image_tokens: SequenceOf[int], image_token_id: int) -> tuple[int, ...]:
    """Replace the i-th image placeholder by `image_tokens[i]` copies of itself.

    Raises:
        ValueError: as many placeholders as images are needed.
    """
    placeholders = sum(token == image_token_id for token in token_ids)
    if placeholders != len(image_tokens):
        raise ValueError(f"{placeholders} image placeholders for {len(image_tokens)} images")
    lengths = iter(image_tokens)
    return tuple(t for token in token_ids for t in ([token] * next(lengths) if token == image_token_id else [token]))


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Builds micro-batches for one model. `pad_multiple` (tensor-parallel size under sequence parallelism) is met by
    one short trailing sequence without loss."""

    image_processor: ImageProcessor
    image_token_id: int
    positions: Positions
    pad_token_id: int
    token_budget: int
    device: torch.device
    pad_multiple: int = 1

    def sequence(self, prompt: Prompt, response_ids: SequenceOf[int]) -> Sequence:
        """A prompt and its response with image placeholders expanded.

        Raises:
            ValueError: the response holds an image placeholder, or is empty.
        """
        if self.image_token_id in response_ids:
            raise ValueError(f"response to {prompt.id} holds an image placeholder: it cannot be trained on")
        if not response_ids:
            raise ValueError(f"response to {prompt.id} is empty")
        lengths = [self.image_processor.num_tokens(self.image_processor(path)) for path in prompt.image_paths]
        expanded = expand_images(prompt.token_ids, lengths, self.image_token_id)
        return Sequence(
            token_ids=expanded + tuple(response_ids), prompt_length=len(expanded), image_paths=prompt.image_paths
        )

    def plan(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int]) -> list[list[int]]:
        """Group `indices` into micro-batches of at most `token_budget` tokens, longest first into the first that fits.

        Deterministic. A sequence longer than the budget gets a micro-batch of its own.
        """
        order = sorted(indices, key=lambda i: (-len(sequences[i].token_ids), i))
        bins: list[tuple[int, list[int]]] = []
        for index in order:
            length = len(sequences[index].token_ids)
            for position, (used, members) in enumerate(bins):
                if used + length <= self.token_budget:
                    bins[position] = (used + length, [*members, index])
                    break
            else:
                bins.append((length, [index]))
        return [sorted(members) for _, members in bins]

    def pack(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int]) -> PackedBatch:
        """One micro-batch of the sequences at `indices`."""
        chosen = [sequences[i] for i in indices]
        images = [[self.image_processor(path) for path in sequence.image_paths] for sequence in chosen]
        positions = [self._positions(*pair) for pair in zip(chosen, images, strict=True)]
        token_ids = [token for sequence in chosen for token in sequence.token_ids]
        bounds = [0]
        for sequence in chosen:
            bounds.append(bounds[-1] + len(sequence.token_ids))
        rows = [_response_rows(sequence, start) for sequence, start in zip(chosen, bounds, strict=False)]
        targets = [token for sequence in chosen for token in sequence.token_ids[sequence.prompt_length :]]
        owners = [i for i, sequence in zip(indices, chosen, strict=True) for _ in range(sequence.response_length)]
        padding = -len(token_ids) % self.pad_multiple
        if padding:
            token_ids += [self.pad_token_id] * padding
            bounds.append(len(token_ids))
            positions.append(torch.arange(padding).expand(3, -1))
        flat = [image for sequence_images in images for image in sequence_images]
        return PackedBatch(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.cat(positions, dim=1)[:, None].to(self.device),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=self.device),
            max_seqlen=max(end - start for start, end in itertools.pairwise(bounds)),
            response_positions=torch.cat(rows).to(self.device),
            targets=torch.tensor(targets, device=self.device),
            response_sequence=torch.tensor(owners, device=self.device),
            sequence_indices=tuple(indices),
            pixel_values=torch.cat([image.pixel_values for image in flat]).to(self.device) if flat else None,
            image_grid_thw=torch.tensor([image.grid for image in flat], device=self.device) if flat else None,
        )

    def _positions(self, sequence: Sequence, images: SequenceOf[ProcessedImage]) -> torch.Tensor:
        return self.positions(
            sequence.token_ids,
            [image.grid for image in images],
            image_token_id=self.image_token_id,
            merge_size=self.image_processor.merge_size,
        )


def _response_rows(sequence: Sequence, start: int) -> torch.Tensor:
    """Positions whose hidden state predicts a response token: one before each of them."""
    return torch.arange(sequence.prompt_length, len(sequence.token_ids)) + start - 1
