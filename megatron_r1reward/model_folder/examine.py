"""Looks at a model folder before anything is loaded from it, and says everything that is wrong at once.

Training, the start of servers, annotation, evaluation, `plan` and `doctor` ask the same questions, so a folder that one
of them takes is one that all of them take.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.model_folder.beside_weights import (
    CHAT_TEMPLATES,
    FIX,
    IMAGE_PROCESSOR,
    PROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    chat_template,
    damaged_files,
    read_object,
)
from megatron_r1reward.model_folder.config_reader import parse_config
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.other_folder import instead_of_model
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder, scalar_problem
from megatron_r1reward.model_folder.shape import ModelShape, load_shape
from megatron_r1reward.processes import quick_imports

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

IMAGE_TOKEN = "<|image_pad|>"
_ONE_MODEL = "take both from one model"


def _missing(folder: Path) -> str:
    try:
        local_folder(folder)
    except ValueError as error:  # a name on the Hub that is not in the cache
        return str(error)
    return instead_of_model(folder)


def folder_problems(
    folder: Path, *, weights: bool = True, trainable: bool = True, scalar: bool = False
) -> Iterator[str]:
    """One line per thing that is wrong with the folder of a model of our families, of what a stage needs of it.

    Args:
        weights: look at the weight files too; False where the weights come from elsewhere.
        trainable: the weights are about to be trained, so quantized ones are refused.
        scalar: a scalar head in place of the LM head is no mistake.
    """
    if not folder.is_dir():
        yield _missing(folder)
        return
    try:
        shape = load_shape(folder)
    except ValueError as error:
        yield _without(str(error), folder)
        shape = None
    if shape is not None and shape.score_layers and not scalar:
        yield scalar_problem(folder)
        return
    if weights and shape is not None:
        try:
            read_folder_weights(folder, trainable=trainable)
        except (ValueError, OSError) as error:
            yield _without(str(error), folder)
    damaged = list(damaged_files(folder))
    yield from damaged
    if not damaged:
        yield from _tokenizer_problems(folder, shape)
        yield from _processor_problems(folder, shape)


def served_problems(folder: Path, *, scalar: bool = False) -> Iterator[str]:
    """The same for a folder that only vLLM reads (a judge, an annotator): it may be of any family. `scalar`: a reward
    model with a scalar head, which must be of ours, is no mistake."""
    if not folder.is_dir():
        yield _missing(folder)
        return
    try:
        if not isinstance(parse_config(folder / "config.json").get("model_type"), str):
            yield f"config.json names no model_type: {FIX}"
        if scalar and is_scalar_folder(folder):
            load_shape(folder)
        elif problem := scalar_problem(folder):
            yield problem
    except ValueError as error:
        yield _without(str(error), folder)
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf")):
        yield "there are no weight files: download them"
    if not any((folder / name).is_file() for name in (TOKENIZER, "vocab.json", "tokenizer.model")):
        yield f"there is no tokenizer (tokenizer.json, vocab.json or tokenizer.model): {FIX}"
    yield from damaged_files(folder)


def check_served(folder: Path, *, scalar: bool = False) -> None:
    """ValueError that names everything that `served_problems` finds."""
    if problems := list(served_problems(folder, scalar=scalar)):
        raise ValueError(f"model folder {folder} cannot be served: {'; '.join(problems)}")


def _without(text: str, folder: Path) -> str:
    """The folder is named once, at the beginning."""
    return text.removeprefix(f"{folder}: ").removeprefix(f"{folder}/").removeprefix(f"{folder} ")


def _tokenizer_problems(folder: Path, shape: ModelShape | None) -> Iterator[str]:
    """What lacks or does not fit, of files that can be read."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        yield f"there is no tokenizer_config.json: {FIX}"
    whole = folder / TOKENIZER
    if not whole.is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        yield f"there is no tokenizer (tokenizer.json, or vocab.json and merges.txt): {FIX}"
        return
    if chat_template(folder) is None:
        yield f"there is no chat template ({', '.join(CHAT_TEMPLATES)}, or in tokenizer_config.json): {FIX}"
    if whole.is_file() and shape is not None:
        yield from _vocabulary_problems(read_object(whole), shape)


def _vocabulary_problems(tokenizer: dict[str, Any], shape: ModelShape) -> Iterator[str]:
    ids = _vocabulary(tokenizer)
    if ids is None:
        yield f"tokenizer.json holds no vocabulary: {FIX}"
        return
    if ids.get(IMAGE_TOKEN) != shape.image_token_id:
        known = f"has {IMAGE_TOKEN} as {ids[IMAGE_TOKEN]}" if IMAGE_TOKEN in ids else f"does not know {IMAGE_TOKEN}"
        yield f"tokenizer.json {known}, config.json's image_token_id is {shape.image_token_id}: {_ONE_MODEL}"
    if max(ids.values(), default=0) >= shape.text.vocab:
        largest = max(ids.values())
        yield f"tokenizer.json has ids up to {largest}, config.json's vocab_size is {shape.text.vocab}: {_ONE_MODEL}"


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int] | None:
    """Token -> id; None where the file holds none."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict) or not isinstance(added, list):
        return None
    pairs = [*words.items(), *((t.get("content"), t.get("id")) for t in added if isinstance(t, dict))]
    good = all(isinstance(word, str) and isinstance(number, int) for word, number in pairs)
    return dict(pairs) if good else None


def _processor_problems(folder: Path, shape: ModelShape | None) -> Iterator[str]:
    own, shared = folder / IMAGE_PROCESSOR, folder / PROCESSOR
    settings = read_object(own) if own.is_file() else None
    if settings is None and shared.is_file():
        settings = read_object(shared).get("image_processor")
    if not isinstance(settings, dict):
        yield f"there is no image processor (preprocessor_config.json): {FIX}"
        return
    if shape is None:
        return
    vision = shape.vision
    sizes = {"patch_size": vision.patch, "merge_size": vision.merge, "temporal_patch_size": vision.frames}
    for key, size in sizes.items():
        if settings.get(key, size) != size:
            yield f"the image processor's {key} is {settings[key]}, the model's is {size}: {_ONE_MODEL}"


def load_tokenizer(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, with the folder's chat template, wherever that is kept.

    Args:
        config: the folder's, where it is loaded already; else transformers loads it.

    Raises:
        ValueError: the files are missing or damaged.
    """
    with quick_imports():  # half of transformers
        from transformers import AutoTokenizer

    shape = load_shape(folder)
    problems = list(damaged_files(folder)) or list(_tokenizer_problems(folder, shape))
    if problems:
        raise ValueError(f"model folder {folder} cannot be used: " + "; ".join(problems))
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template(folder)
    return tokenizer
