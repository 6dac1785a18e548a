"""The model of a command's `--model`: a folder that is served here, or servers that run, and its name in records."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.types import ModelAccess

log = logging.getLogger(__name__)


def open_model(access: ModelAccess, options: AskOptions | None = None) -> tuple[RewardModel, str]:
    """The model, and its name in records: a folder is named by its content, servers by their URLs.

    Args:
        options: how it is asked; `max_tokens` is that of `access`.

    Raises:
        ValueError: it is no model folder, or cannot be served.
    """
    options = dataclasses.replace(options or AskOptions(), max_tokens=access.max_tokens)
    if "://" in access.model:
        urls, key = access.model.split(","), os.environ.get(access.api_key_variable)
        name = access.model if access.model_name is None else f"{access.model} {access.model_name}"
        return RewardModel.connect(urls, model=access.model_name, api_key=key, options=options), name
    folder = Path(access.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {folder} has no config.json: give a Hugging Face model folder, or a server's URL")
    if access.model_name is not None:
        raise ValueError(f"--model-name {access.model_name!r} is for servers, {folder} is a folder: leave it out")
    name = model_identity(folder)
    opened = RewardModel.from_pretrained(
        folder, servers=access.servers, max_model_len=access.max_model_len, options=options, report=log.info
    )
    return opened, name
