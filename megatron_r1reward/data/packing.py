"""Sequences to packed micro-batches: expand image placeholders, compute positions per sequence, then pack."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch

from megatron_r1reward.data.balance import Bins, Cost
from megatron_r1reward.data.pixels import ImageProcessor, ProcessedImage
from megatron_r1reward.models.registry import Positions
from megatron_r1reward.parallel.setup import to_device
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
    """Builds micro-batches for one model. A row is padded to `pad_multiple` (sequence parallelism, FP8) by one short
    trailing sequence, each sequence to `sequence_multiple` (context parallelism) at its end; neither carries a loss."""

    image_processor: ImageProcessor
    image_token_id: int
    positions: Positions
    pad_token_id: int
    token_budget: int
    device: torch.device
    pad_multiple: int = 1
    sequence_multiple: int = 1
    share_images: bool = False
    last_token_only: bool = False  # a scalar head scores whole sequences: it is read at the last token of each

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

    def plan_pairs(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """As `plan`, for sequences 2n and 2n + 1 that have to share a micro-batch."""
        lengths = [len(one.token_ids) + -len(one.token_ids) % self.sequence_multiple for one in sequences]
        pairs = [
            replace(one, token_ids=(self.pad_token_id,) * (lengths[2 * n] + lengths[2 * n + 1]))
            for n, one in enumerate(sequences[::2])
        ]
        plan = self.plan(pairs, range(len(pairs)))
        return [[i for pair in members for i in (2 * pair, 2 * pair + 1)] for members in plan]

    def plan(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int]) -> list[list[int]]:
        """Group `indices` into micro-batches of at most `token_budget` tokens, longest first into the first that fits.

        Deterministic. A sequence longer than the budget gets a micro-batch of its own. With `share_images`, sequences
        with the same images stand next to each other in that order, so that most of them share a micro-batch. Without,
        the micro-batches are then made even: pipeline stages wait for the longest.
        """

        def length(index: int) -> int:
            return len(sequences[index].token_ids) + -len(sequences[index].token_ids) % self.sequence_multiple

        longest: dict[tuple[str, ...], tuple[int, int]] = {}
        for index in indices if self.share_images else ():
            paths = sequences[index].image_paths
            if paths:
                longest[paths] = min(longest.get(paths, (0, index)), (-length(index), index))
        order = sorted(indices, key=lambda i: (longest.get(sequences[i].image_paths, (-length(i), i)), -length(i), i))
        bins: list[tuple[int, list[int]]] = []
        for index in order:
            for position, (used, members) in enumerate(bins):
                if used + length(index) <= self.token_budget:
                    bins[position] = (used + length(index), [*members, index])
                    break
            else:
                bins.append((length(index), [index]))
        return self._evened([members for _, members in bins], length, keep=bool(longest))

    def _evened(self, parts: list[list[int]], length: Callable[[int], int], *, keep: bool) -> list[list[int]]:
        """As many micro-batches with nearly equal numbers of tokens, where these fit into the budget as well."""
        bins = Bins(len(parts))
        bins.add({index: Cost(own=length(index)) for members in parts for index in members})
        even = not keep and all(members for members in bins.members) and max(bins.loads, default=0) <= self.token_budget
        return [sorted(members) for members in (bins.members if even else parts)]

    def pack(self, sequences: SequenceOf[Sequence], indices: SequenceOf[int]) -> PackedBatch:
        """One micro-batch of the sequences at `indices`; without any, a row of padding."""
        chosen = [sequences[i] for i in indices]
        token_ids: list[int] = []
        bounds, starts, positions = [0], [], []
        for sequence in chosen:
            images = [self.image_processor(path) for path in sequence.image_paths]
            starts.append(bounds[-1])
            token_ids += sequence.token_ids
            padding = -len(sequence.token_ids) % self.sequence_multiple
            token_ids += [self.pad_token_id] * padding
            positions += [self._positions(sequence, images), torch.arange(padding).expand(3, -1)]
            bounds.append(len(token_ids))
        padding = -len(token_ids) % self.pad_multiple if chosen else max(self.pad_multiple, 1)
        if padding:
            token_ids += [self.pad_token_id] * padding
            bounds.append(len(token_ids))
            positions.append(torch.arange(padding).expand(3, -1))
        # A response token is predicted one before it; what scores a sequence is read at its last token itself.
        shift = 0 if self.last_token_only else 1
        firsts = [len(one.token_ids) - 1 if self.last_token_only else one.prompt_length for one in chosen]
        spans = [range(first, len(one.token_ids)) for first, one in zip(firsts, chosen, strict=True)]
        rows = [torch.arange(len(s)) + (start + s.start - shift) for start, s in zip(starts, spans, strict=True)]
        targets = [one.token_ids[i] for one, span in zip(chosen, spans, strict=True) for i in span]
        owners = [i for i, span in zip(indices, spans, strict=True) for _ in span]
        return PackedBatch(
            input_ids=self._placed(torch.tensor([token_ids])),
            position_ids=self._placed(torch.cat(positions, dim=1)[:, None]),
            cu_seqlens=self._placed(torch.tensor(bounds, dtype=torch.int32)),
            bounds=tuple(bounds),
            response_positions=self._placed(torch.cat([torch.empty(0, dtype=torch.int64), *rows])),
            targets=self._placed(torch.tensor(targets, dtype=torch.int64)),
            response_sequence=self._placed(torch.tensor(owners, dtype=torch.int64)),
            sequence_indices=tuple(indices),
            last_token_only=self.last_token_only,
            **self._images(chosen),
        )

    def _images(self, chosen: SequenceOf[Sequence]) -> dict[str, torch.Tensor | None]:
        """Every distinct image once, and where its tokens go."""
        paths = [path for sequence in chosen for path in sequence.image_paths]
        if not paths:
            return {"pixel_values": None, "image_grid_thw": None}
        distinct = list(dict.fromkeys(paths))
        images = [self.image_processor(path) for path in distinct]
        rows = None
        if len(distinct) < len(paths):
            lengths = [self.image_processor.num_tokens(image) for image in images]
            spans = dict(zip(distinct, torch.arange(sum(lengths)).split(lengths), strict=True))
            rows = self._placed(torch.cat([spans[path] for path in paths]))
        return {
            "pixel_values": self._placed(torch.cat([image.pixel_values for image in images])),
            "image_grid_thw": torch.tensor([image.grid for image in images]),
            "image_rows": rows,
        }

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device)

    def _positions(self, sequence: Sequence, images: SequenceOf[ProcessedImage]) -> torch.Tensor:
        return self.positions(
            sequence.token_ids,
            [image.grid for image in images],
            image_token_id=self.image_token_id,
            merge_size=self.image_processor.merge_size,
        )
