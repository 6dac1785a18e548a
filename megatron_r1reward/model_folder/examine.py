"""Looks at a model folder before anything is loaded from it, and says everything that is wrong at once.

Training, the start of servers, annotation, evaluation, `plan` and `doctor` ask the same questions, so a folder that one
of them takes is one that all of them take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.model_folder.config_reader import parse_config
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.scalar_folder import scalar_problem
from megatron_r1reward.model_folder.shape import ModelShape, load_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<|image_pad|>"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_ONE_MODEL = "take both from one model"
_FIX = "copy it from the model that this one was made from"


def examine_folder(folder: Path, *, weights: bool = True, trainable: bool = True) -> ModelShape:
    """What a model computes, when everything that a stage needs of its folder is there and fits together.

    Args:
        weights: look at the weight files too; False where the weights come from elsewhere.
        trainable: the weights are about to be trained, so quantized ones are refused.

    Raises:
        ValueError: what is missing or does not fit, all of it.
    """
    problems = list(folder_problems(folder, weights=weights, trainable=trainable))
    if problems:
        raise ValueError(f"model folder {folder} cannot be used: " + "; ".join(problems))
    return load_shape(folder)


def _missing(folder: Path) -> str:
    try:
        local_folder(folder)
    except ValueError as error:
        return str(error)
    return f"{folder} is no folder: give the folder that holds config.json"


def folder_problems(
    folder: Path, *, weights: bool = True, trainable: bool = True, scalar: bool = False
) -> Iterator[str]:
    """One line per thing that is wrong with the folder of a model of our families; see `examine_folder`. `scalar`: a
    scalar head in place of the LM head is no mistake."""
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
    yield from _tokenizer_problems(folder, shape)
    yield from _processor_problems(folder, shape)


def served_problems(folder: Path) -> Iterator[str]:
    """The same for a folder that only vLLM reads (a judge, an annotator): it may be of any family."""
    if not folder.is_dir():
        yield _missing(folder)
        return
    try:
        if not isinstance(parse_config(folder / "config.json").get("model_type"), str):
            yield f"config.json names no model_type: {_FIX}"
        if problem := scalar_problem(folder):
            yield problem
    except ValueError as error:
        yield _without(str(error), folder)
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf")):
        yield "there are no weight files: download them"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        yield f"there is no tokenizer (tokenizer.json, vocab.json or tokenizer.model): {_FIX}"


def _without(text: str, folder: Path) -> str:
    """The folder is named once, at the beginning."""
    return text.removeprefix(f"{folder}: ").removeprefix(f"{folder}/").removeprefix(f"{folder} ")


def _json(path: Path) -> dict[str, Any]:
    """ValueError when the file is no JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}): {_FIX}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is no JSON object: {_FIX}")
    return tree


def _tokenizer_problems(folder: Path, shape: ModelShape | None) -> Iterator[str]:
    if not (folder / "tokenizer_config.json").is_file():
        yield f"there is no tokenizer_config.json: {_FIX}"
    whole = folder / "tokenizer.json"
    if not whole.is_file() and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        yield f"there is no tokenizer (tokenizer.json, or vocab.json and merges.txt): {_FIX}"
        return
    try:
        if chat_template(folder) is None:
            yield f"there is no chat template ({', '.join(CHAT_TEMPLATES)}, or in tokenizer_config.json): {_FIX}"
        if whole.is_file() and shape is not None:
            yield from _vocabulary_problems(_json(whole), shape)
    except ValueError as error:
        yield str(error)


def _vocabulary_problems(tokenizer: dict[str, Any], shape: ModelShape) -> Iterator[str]:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict) or not isinstance(added, list):
        yield f"tokenizer.json holds no vocabulary: {_FIX}"
        return
    tokens = [token for token in added if isinstance(token, dict) and {"content", "id"} <= set(token)]
    ids = words | {token["content"]: token["id"] for token in tokens}
    if ids.get(IMAGE_TOKEN) != shape.image_token_id:
        known = f"has {IMAGE_TOKEN} as {ids[IMAGE_TOKEN]}" if IMAGE_TOKEN in ids else f"does not know {IMAGE_TOKEN}"
        yield f"tokenizer.json {known}, config.json's image_token_id is {shape.image_token_id}: {_ONE_MODEL}"
    if max(ids.values(), default=0) >= shape.text.vocab:
        largest = max(ids.values())
        yield f"tokenizer.json has ids up to {largest}, config.json's vocab_size is {shape.text.vocab}: {_ONE_MODEL}"


def _processor_problems(folder: Path, shape: ModelShape | None) -> Iterator[str]:
    own, shared = folder / "preprocessor_config.json", folder / "processor_config.json"
    try:
        settings = _json(own) if own.is_file() else _json(shared).get("image_processor") if shared.is_file() else None
    except ValueError as error:
        yield str(error)
        return
    if not isinstance(settings, dict):
        yield f"there is no image processor (preprocessor_config.json): {_FIX}"
        return
    if shape is None:
        return
    vision = shape.vision
    sizes = {"patch_size": vision.patch, "merge_size": vision.merge, "temporal_patch_size": vision.frames}
    for key, size in sizes.items():
        if settings.get(key, size) != size:
            yield f"the image processor's {key} is {settings[key]}, the model's is {size}: {_ONE_MODEL}"


def chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, wherever versions of transformers have put it; None when there is none.

    Raises:
        ValueError: a file that may hold it is damaged.
    """
    if (folder / CHAT_TEMPLATES[0]).is_file():
        return (folder / CHAT_TEMPLATES[0]).read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", CHAT_TEMPLATES[1]):
        found = _json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # named ones: the plain chat is called default
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(found, str) and found:
            return found
    return None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, with the folder's chat template, wherever that is kept.

    Raises:
        ValueError: the files are missing or damaged.
    """
    from transformers import AutoTokenizer

    shape = load_shape(folder)
    problems = list(_tokenizer_problems(folder, shape))
    if problems:
        raise ValueError(f"model folder {folder} cannot be used: " + "; ".join(problems))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template(folder)
    return tokenizer
