"""The model of a command's `--model`: a folder that is served here, or servers that run, and its name in records."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.compare import Votes
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.judging.served import asked_by, policy_of
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.types import ModelAccess

log = logging.getLogger(__name__)


def access_policy(access: ModelAccess) -> PromptPolicy | None:
    """What the folder of the model, or the one that its servers serve, says; None: it says nothing, or is not known.

    Raises:
        ValueError: it is no model folder, or what it says cannot be read.
    """
    access.check()
    folder = access.prompt_of if access.remote else local_folder(access.model)
    return None if folder is None else policy_of(folder)


def open_model(
    access: ModelAccess, options: AskOptions | None = None, *, votes: Votes | None = None
) -> tuple[RewardModel, str]:
    """The model, and its name in records: a folder is named by its content, servers by their URLs; the prompt that a
    folder says belongs to the name.

    Args:
        options: how it is asked; `max_tokens` and `trust_parser` are those of `access`.
        votes: how it will be asked; a folder that says otherwise is refused before servers start.

    Raises:
        ValueError: it is no model folder, cannot be served, or says that it is asked otherwise.
    """
    options = dataclasses.replace(
        options or AskOptions(), max_tokens=access.max_tokens, trust_parser=access.trust_parser
    )
    policy = access_policy(access)
    if policy is not None:
        if votes is not None:
            policy.check_orders(votes.both_orders, "--one-order")
            votes.check_kind(policy.kind)
        asked_by(policy, options)
    if access.remote:
        urls, key = access.model.split(","), os.environ.get(access.api_key_variable)
        name = access.model if access.model_name is None else f"{access.model} {access.model_name}"
        opened = RewardModel.connect(
            urls, model=access.model_name, api_key=key, options=options, folder=access.prompt_of
        )
        return opened, name + _digest(policy)
    folder = local_folder(access.model)
    name = model_identity(folder) + _digest(policy)
    opened = RewardModel.from_pretrained(
        folder, servers=access.servers, max_model_len=access.max_model_len, options=options, report=log.info
    )
    return opened, name


def _digest(policy: PromptPolicy | None) -> str:
    """Of the prompt; nothing where the folder says none, or it is not known."""
    return "" if policy is None else " " + hashlib.blake2b(policy.template.encode(), digest_size=8).hexdigest()
