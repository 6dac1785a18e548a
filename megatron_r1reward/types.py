"""The values that cross module boundaries: frozen, keyword-only, with shapes in the docstrings.

Paths, token ids and numbers travel; decoded images never do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Label = Literal[1, 2]
JudgeVerdict = Literal["consistent", "inconsistent", "unknown", "not_asked"]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One human (or programmatic) preference: which of two responses to a question about images is better.

    `response_images`: how many of the images stand in each response, where its text has `<image>`; 0: such a text is a
    text. The images of the question come first in the prompt.
    """

    id: str
    question: str
    responses: tuple[str, str]
    label: Label | None  # None: neither is known to be better, which only RL with a reward for agreement takes
    image_paths: tuple[str, ...]  # absolute paths; order is the order of the images in the prompt
    metadata: Mapping[str, str] = field(default_factory=dict)  # e.g. category, source
    response_images: tuple[int, int] = (0, 0)

    @property
    def question_images(self) -> int:
        """How many images come first."""
        return len(self.image_paths) - sum(self.response_images)

    def exchanged(self) -> Preference:
        """The same with its responses, and their images, in each other's places."""
        return replace(
            self,
            responses=self.responses[::-1],
            label=None if self.label is None else 2 if self.label == 1 else 1,
            image_paths=exchange_images(self.image_paths, self.response_images),
            response_images=self.response_images[::-1],
        )

    @property
    def known_label(self) -> Label:
        """Where rows without a label are not read."""
        assert self.label is not None, f"{self.id} has no label"
        return self.label


def exchange_images(images: AnySequence[T], response_images: tuple[int, int]) -> tuple[T, ...]:
    """`images` of a pair, in the order of its prompt, when the responses change places."""
    asked = len(images) - sum(response_images)
    second = asked + response_images[0]
    return (*images[:asked], *images[second:], *images[asked:second])


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A preference rendered as the reward model's input, in one of the two answer orders.

    `token_ids` are unexpanded: every image is ONE `<|image_pad|>` (vLLM expands it itself; the trainer expands it
    from the image grid). `label` is the right answer in the order shown, i.e. already swapped when `swapped`; None
    where the preference has none. Prompts of one `group` are the two orders of one pair: their samples are compared
    with each other. A pointwise prompt shows the first response of its order alone; `label` 1: it is the better one.
    """

    id: str  # unique within a run: preference id, order and occurrence
    preference_id: str
    token_ids: tuple[int, ...]
    image_paths: tuple[str, ...]
    label: Label | None
    swapped: bool
    group: str = ""  # "": the prompt is a group of its own

    @property
    def group_id(self) -> str:
        """Equal for all prompts whose samples are compared with each other."""
        return self.group or self.id

    @property
    def known_label(self) -> Label:
        """Where rows without a label are not read."""
        assert self.label is not None, f"{self.id} has no label"
        return self.label


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """Tokens [start, end) of a rollout were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response. `log_probs[t]` is the natural-log probability of `token_ids[t]` under the untempered
    softmax of the model that sampled it (docs/numerics.md)."""

    prompt: Prompt
    sample_index: int
    token_ids: tuple[int, ...]  # response tokens including the final end-of-turn token when there is one
    log_probs: tuple[float, ...]  # [T], same length as token_ids
    text: str  # decoded without special tokens
    finish_reason: str  # "stop" | "length"
    weight_spans: tuple[WeightSpan, ...]
    special_tokens: bool = False  # it holds some besides the one that ended it; `text` does not show them


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout and the parts of its reward, by default R = 0.5 F + A (1 + 0.5 C)."""

    rollout: Rollout
    format_reward: float  # F in {0, 1}
    result_reward: float  # A in {0, 1}; of a rating in [0, 1]
    consistency_reward: float  # C in {0, 1} (paper) or {-1, 0, 1} (released code)
    reward: float
    predicted: Label | None  # strict parse of <answer>; None when it is not exactly 1 or 2, and of a pointwise prompt
    verdict: JudgeVerdict
    # Values of the reward's other terms, before their weights: agreement with oneself, functions of the user's
    terms: Mapping[str, float] = field(default_factory=dict)
    masked: bool = False  # trains nothing and is no part of any statistic of the rewards
    rating: int | None = None  # strict parse of <answer> where the prompt is pointwise


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A prompt and a response as the trainer sees them: image placeholders expanded to one id per merged patch."""

    token_ids: tuple[int, ...]
    prompt_length: int  # tokens [prompt_length, len(token_ids)) are the response
    image_paths: tuple[str, ...]

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: S sequences back to back in one row of T tokens. Padding, where context or sequence parallelism
    needs some, ends a sequence or the row and carries no loss.

    R response tokens carry a loss (`last_token_only`: R = S, the last token of each sequence, which is read at its own
    position). Row r of the flat response axis is predicted from the hidden state at position
    `response_positions[r]` and belongs to sequence `response_sequence[r]` (index into the global batch).
    """

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [3, 1, T]: temporal, height, width (M-RoPE), computed per sequence
    cu_seqlens: torch.Tensor  # int32 [S + 1]
    bounds: tuple[int, ...]  # the same numbers on the host, so that nothing has to be read from the device
    response_positions: torch.Tensor  # int64 [R]
    targets: torch.Tensor  # int64 [R]
    response_sequence: torch.Tensor  # int64 [R]
    sequence_indices: tuple[int, ...]  # S indices into the global list of sequences
    pixel_values: torch.Tensor | None  # float32 [P, patch_dim], patches of the distinct images; None without images
    image_grid_thw: torch.Tensor | None  # int64 [I, 3], on the CPU: the layout of patches is computed there
    # int64 [image tokens]: row of the I images' embeddings at each placeholder; None: every image stands once, in order
    image_rows: torch.Tensor | None = None
    last_token_only: bool = False  # for a scalar head that scores whole sequences

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])


_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int64": 8,
    "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorMeta:
    """A tensor without its values."""

    name: str  # Hugging Face checkpoint name
    dtype: str  # torch's name without the prefix, e.g. "bfloat16"
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorMeta:
        return cls(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch  # here: clients that only ask a model load without it

        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"tensor {self.name}: {self.dtype!r} is not a torch dtype; send e.g. 'bfloat16'")
        return dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """ValueError when the dtype is none that files hold."""
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"tensor {self.name}: {self.dtype!r} is none of {', '.join(_ITEM_BYTES)}")
        return self.numel * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ModelAccess:
    """What `r1reward score` and `bench` are told about a model; the commands' options are made of these fields."""

    model: str  # folder, "org/name@revision", or URLs of servers, comma-separated
    model_name: str | None = None  # at the URLs; None: the first that they list
    servers: int = 1  # started for a folder
    max_tokens: int = 1024  # of one judgement
    max_model_len: int = 16384  # of started servers
    api_key_variable: str = "OPENAI_API_KEY"
    prompt_of: Path | None = None  # the folder that the servers at URLs serve: it says its prompt
    trust_parser: bool = False  # run the code that the folder carries for reading its verdicts

    @property
    def remote(self) -> bool:
        """Servers that run, not a folder that is served here."""
        return "://" in self.model

    def check(self) -> None:
        """ValueError where something is said about servers, and the model is a folder."""
        if self.remote:
            return
        for option, value in (("--prompt-of", self.prompt_of), ("--model-name", self.model_name)):
            if value is not None:
                raise ValueError(f"{option} {str(value)!r} is for servers, {self.model} is a folder: leave it out")
