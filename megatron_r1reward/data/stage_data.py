"""What a stage reads: its rows, measured against the stage's limits, and the folders that its images may come from.

A row that is too long is set aside when the data are read, with its reason, not found out by the step that draws it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.image_files import folders_behind_links, upright_size
from megatron_r1reward.data.preference import ReadResult, SftReadResult, read_preferences, read_sft_examples
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import (
    POINTWISE_TEMPLATE,
    TEMPLATE,
    images_shown,
    messages_of,
    preference_messages,
    render_chat,
)
from megatron_r1reward.data.rows import fixed_folder
from megatron_r1reward.model_folder.prompt_policy import FIELDS, check_template, read_policy
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.processes import quick_imports
from megatron_r1reward.types import Preference
from megatron_r1reward.user_parts import read_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stage = Literal["sft", "rm", "annotate", "rl", "eval"]
SCALAR_TEMPLATE = "{question}"  # of the user's turn where a scalar head scores the assistant's
_TOKEN_PIXELS = 28 * 28  # of one image token in the finest grid of the models (patches of 14 x 14, merged 2 x 2)


def kind_of(config: RunConfig) -> Literal["generative", "pointwise"]:
    """Whether a stage's model compares two responses or rates one: as the run file says, else the model's folder.

    Raises:
        ValueError: what the folder says cannot be read.
    """
    if config.prompt.kind is not None:
        return config.prompt.kind
    policy = None if config.rl.pairing == "pointwise" else read_policy(config.model.path)
    rates = config.rl.pairing == "pointwise" or (policy is not None and policy.kind == "pointwise")
    return "pointwise" if rates else "generative"


def template_of(config: RunConfig) -> str:
    """The prompt that a stage asks with: `prompt.template`, else what the model's folder says if that is of the same
    kind, else the published one, or ours for a pointwise model.

    Raises:
        ValueError: the file or what the folder says cannot be read.
    """
    kind = kind_of(config)
    if config.prompt.template is None:
        policy = read_policy(config.model.path)
        own = POINTWISE_TEMPLATE if kind == "pointwise" else TEMPLATE
        return policy.template if policy is not None and policy.kind == kind else own
    part = read_part("prompt.template", config.prompt.template)
    try:
        check_template(part.source, FIELDS[kind])
    except ValueError as error:
        raise ValueError(f"prompt.template {part.name!r}: {error}; write other braces twice") from error
    return part.source


def image_folders(config: RunConfig) -> list[Path]:
    """The folders that a stage's images may come from, what links in them lead to included; servers get these."""
    roots = [config.data.image_root or fixed_folder(config.data.train), *config.data.image_roots]
    if config.evaluation.data is not None:
        roots.append(config.evaluation.image_root or fixed_folder(config.evaluation.data))
    linked = [folder for root in roots if root.is_dir() for folder in folders_behind_links(root)]
    return [*roots, *linked, config.run.output_dir]


def read_training_preferences(config: RunConfig, stage: Stage, *, output: Path | None = None) -> ReadResult:
    """`data.train` for all but `sft`. `output`: folder for quarantine and media; default `run.output_dir`.

    Rows without a label are read for `rl` where the reward has something that they can earn.
    """
    output = output or config.run.output_dir
    return read_preferences(
        config.data.train,
        image_root=config.data.image_root,
        image_roots=config.data.image_roots,
        max_frames=config.data.max_frames,
        media_dir=output / "media",
        quarantine=output / "quarantine.jsonl",
        fits=_fits(config, stage),
        unlabelled=stage == "rl" and config.reward.rewards_agreement,
    )


def _fits(config: RunConfig, stage: Stage) -> Callable[[Preference], str] | None:
    """A scalar reward model reads each response on its own."""
    if not _has_tokenizer(config):
        return None
    limits = RowLimits.of(config, stage)
    return limits.scored if stage == "rm" else limits.preference


def read_heldout(config: RunConfig, *, output: Path | None = None, scalar: bool = False) -> ReadResult:
    """`evaluation.data`, as above; `scalar`: as a scalar reward model reads it.

    Raises:
        ValueError: it is not set.
    """
    if config.evaluation.data is None:
        raise ValueError("evaluation.data is not set: name the JSONL with held-out preferences")
    output = output or config.run.output_dir
    return read_preferences(
        config.evaluation.data,
        image_root=config.evaluation.image_root,
        image_roots=config.data.image_roots,
        max_frames=config.data.max_frames,
        media_dir=output / "media",
        quarantine=output / "heldout-quarantine.jsonl",
        fits=_fits(config, "rm" if scalar else "eval"),
    )


def read_training_examples(config: RunConfig, *, output: Path | None = None) -> SftReadResult:
    """`data.train` for `sft`, as above."""
    output = output or config.run.output_dir
    return read_sft_examples(
        config.data.train,
        image_root=config.data.image_root,
        image_roots=config.data.image_roots,
        max_frames=config.data.max_frames,
        media_dir=output / "media",
        quarantine=output / "quarantine.jsonl",
        fits=RowLimits.of(config, "sft").example if _has_tokenizer(config) else None,
        rated=template_of(config) if kind_of(config) == "pointwise" else None,
    )


def read_stage(config: RunConfig, stage: Stage, *, output: Path | None = None) -> dict[str, ReadResult | SftReadResult]:
    """Everything that `stage` reads, by the key of the run file that names it, exactly as the stage will read it.

    Raises:
        ValueError: a file cannot be read, or holds no usable row.
    """
    found: dict[str, ReadResult | SftReadResult] = {}
    if stage == "sft":
        found["data.train"] = read_training_examples(config, output=output)
    elif stage != "eval":
        found["data.train"] = read_training_preferences(config, stage, output=output)
    if stage == "eval" or (stage == "rl" and config.rl.heldout_every is not None):
        scalar = stage == "eval" and is_scalar_folder(config.model.path)
        found["evaluation.data"] = read_heldout(config, output=output, scalar=scalar)
    if stage == "rm" and config.reward_model.heldout_every is not None:
        found["evaluation.data"] = read_heldout(config, output=output, scalar=True)
    return found


def scored_examples(preference: Preference) -> tuple[SftExample, SftExample]:
    """What a scalar reward model reads of a pair: the images and the question, and the better response as the
    assistant's turn; the same with the other response."""
    images = [{"type": "image"} for _ in preference.image_paths]
    text = SCALAR_TEMPLATE.format(question=preference.question)
    turn = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    better, other = (
        SftExample(
            id=f"{preference.id}/{place + 1}",
            messages=(turn,),
            image_paths=preference.image_paths,
            response=preference.responses[place],
        )
        for place in ((0, 1) if preference.known_label == 1 else (1, 0))
    )
    return better, other


@dataclass(frozen=True)
class RowLimits:
    """How long a row may be, and which images servers may read.

    Texts are tokenized only where their bytes do not settle the question: byte-level BPE makes no token of less than a
    byte.
    """

    model: Path
    prompt_tokens: int  # data.max_prompt_tokens, images counted as one token each
    sequence_tokens: int | None  # images expanded, response included
    sequence_key: str  # what sets it
    response_tokens: int  # room that a sampled response needs
    min_pixels: int
    max_pixels: int
    folders: tuple[Path, ...] | None  # of images that servers read; None: they are sent, or there are no servers
    template: str = TEMPLATE

    @classmethod
    def of(cls, config: RunConfig, stage: Stage) -> RowLimits:
        served = stage in ("rl", "eval") or (stage == "annotate" and config.annotate.url is None)
        tokens, key = _max_positions(config.model.path), f"max_position_embeddings of {config.model.path}"
        if served and (tokens is None or config.rollout.max_model_len < tokens):
            tokens, key = config.rollout.max_model_len, "rollout.max_model_len"
        if stage == "annotate" and config.annotate.url is not None:
            tokens = None  # the remote model's own
        return cls(
            model=config.model.path,
            prompt_tokens=config.data.max_prompt_tokens,
            sequence_tokens=tokens,
            sequence_key=key,
            response_tokens=config.sampling.max_tokens,
            min_pixels=config.data.min_pixels,
            max_pixels=config.data.max_pixels,
            folders=tuple(folder.resolve() for folder in image_folders(config)) if stage in ("rl", "eval") else None,
            template=template_of(config),
        )

    def preference(self, preference: Preference) -> str:
        """Why it does not fit, in the longer of its two orders; empty where it does."""
        problem = self._unreachable(preference.image_paths)
        if problem:
            return problem
        texts = (preference.question, *preference.responses)
        if self._surely_fits(texts, len(preference.image_paths), self.response_tokens):
            return ""
        images = {images_shown(order, self.template) for order in (preference, preference.exchanged())}
        most = max(images, key=lambda paths: sum(map(self.image_tokens, paths))) if len(images) > 1 else images.pop()
        return self._problem(self.prompt_length(preference), most, self.response_tokens, "room for the response")

    def prompt_length(self, preference: Preference) -> int:
        """Tokens of the prompt in the longer of its two orders, each image counted as one."""
        return max(
            len(render_chat(self._tokenizer, messages_of(shown, template=self.template)))
            for shown in (preference, preference.exchanged())
        )

    def example(self, example: SftExample) -> str:
        """Why it does not fit; empty where it does."""
        texts = [part["text"] for turn in example.messages for part in turn["content"] if part["type"] == "text"]
        frame = len(example.messages) * _JOINTS + _most_tokens(example.response) + 1
        if self._surely_fits(texts, len(example.image_paths), frame):
            return ""
        response = len(self._tokenizer.encode(example.response, add_special_tokens=False)) + 1  # the end of the turn
        prompt = len(render_chat(self._tokenizer, example.messages))
        return self._problem(prompt, example.image_paths, response, "response")

    def scored(self, preference: Preference) -> str:
        """Why one of its two sequences does not fit a scalar reward model; empty where both do."""
        if any(preference.response_images):
            return "a response shows images, which a scalar reward model does not read"
        return next((text for one in scored_examples(preference) if (text := self.example(one))), "")

    def _unreachable(self, paths: Iterable[str]) -> str:
        if self.folders is None:
            return ""
        for path in paths:
            target = Path(path).resolve()
            if not any(target.is_relative_to(folder) for folder in self.folders):
                return f"image {path!r} leads to {target}: name its folder in data.image_roots, so that servers read it"
        return ""

    def _surely_fits(self, texts: Sequence[str], images: int, response: int) -> bool:
        prompt = self._frame_tokens + sum(map(_most_tokens, texts)) + 3 * images
        sequence = prompt + images * (self.max_pixels // _TOKEN_PIXELS + 1) + response
        return prompt <= self.prompt_tokens and (self.sequence_tokens is None or sequence <= self.sequence_tokens)

    def _problem(self, prompt: int, image_paths: Sequence[str], response: int, name: str) -> str:
        if prompt > self.prompt_tokens:
            return f"the prompt has {prompt} tokens, data.max_prompt_tokens is {self.prompt_tokens}"
        if self.sequence_tokens is None:
            return ""
        image = sum(map(self.image_tokens, image_paths)) - len(image_paths)
        if prompt + image + response > self.sequence_tokens:
            return (
                f"{prompt + image + response} tokens (text {prompt}, images {image}, {name} {response}), "
                f"{self.sequence_key} is {self.sequence_tokens}"
            )
        return ""

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        with quick_imports():
            from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, local_files_only=True)

    @cached_property
    def _processor(self) -> Any:
        with quick_imports():
            from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.model, local_files_only=True)

    @cached_property
    def _frame_tokens(self) -> int:
        """At most so many tokens of the chat template and the prompt's own words."""
        messages = preference_messages("", ("", ""), 0, template=self.template)
        return len(render_chat(self._tokenizer, messages)) + _JOINTS

    def image_tokens(self, path: str) -> int:
        """Tokens that the model reads of an image file."""
        width, height = upright_size(path)
        pixels = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return self._processor.get_number_of_image_patches(height, width, pixels) // self._processor.merge_size**2


_JOINTS = 64  # tokens that inserting texts into the template may split


def _has_tokenizer(config: RunConfig) -> bool:
    """Not needed by `annotate` at an endpoint; a stage that needs one says itself that it is missing."""
    return any((config.model.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _most_tokens(text: str) -> int:
    """The bytes of `text` as the tokenizer sees it, which normalises to NFC."""
    return len(text) if text.isascii() else len(unicodedata.normalize("NFC", text).encode())


def _max_positions(model: Path) -> int | None:
    """From config.json; None where there is none to read, which the stage will find out."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("text_config", config).get("max_position_embeddings")
    return found if isinstance(found, int) else None
