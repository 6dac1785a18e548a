"""What a server may answer besides a response that ended: it is asked again, or the prompt fails alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import prompts
from transformers import AutoTokenizer

from megatron_r1reward.rollout.client import RolloutClient, UnfinishedError, _Choice
from megatron_r1reward.types import Rollout


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


def read(tokenizer: Any, text: str, *, finish_reason: str = "stop") -> Rollout:
    ids = tokenizer.encode(text, add_special_tokens=False)
    choice = _Choice.model_validate(
        {
            "index": 0,
            "finish_reason": finish_reason,
            "token_ids": ids,
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in ids]},
            "weight_versions": [],
        }
    )
    client = RolloutClient("http://127.0.0.1:1", model="m", tokenizer=tokenizer)
    try:
        return client._rollout(prompts(1)[0], choice)
    finally:
        asyncio.run(client.aclose())


WHOLE = "<think>a</think><answer>1</answer>"


def test_the_token_that_ended_a_response_is_part_of_it(tokenizer: Any) -> None:
    found = read(tokenizer, WHOLE + "<|im_end|>")
    assert (found.text, found.special_tokens) == (WHOLE, False)
    assert not read(tokenizer, WHOLE, finish_reason="length").special_tokens


@pytest.mark.parametrize(
    ("text", "finish_reason"),
    [
        (WHOLE + "<|im_start|>" * 5 + "<|im_end|>", "stop"),
        ("<|im_start|>" + WHOLE + "<|im_end|>", "stop"),
        (WHOLE + "<|im_end|><|im_end|>", "stop"),
        (WHOLE + "<|endoftext|>" * 9, "length"),
    ],
)
def test_runs_of_special_tokens_are_seen(tokenizer: Any, text: str, finish_reason: str) -> None:
    found = read(tokenizer, text, finish_reason=finish_reason)
    assert (found.text, found.special_tokens) == (WHOLE, True), "the text does not show them"


@pytest.mark.parametrize(("text", "finish_reason"), [(WHOLE, "abort"), (WHOLE, "error"), ("", "stop"), ("", "length")])
def test_an_aborted_or_empty_response_is_no_response(tokenizer: Any, text: str, finish_reason: str) -> None:
    with pytest.raises(UnfinishedError, match="sample 0"):
        read(tokenizer, text, finish_reason=finish_reason)
