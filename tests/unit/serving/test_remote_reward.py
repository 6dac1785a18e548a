"""The released remote-reward protocol: same route, same JSON, this package's reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.serving.remote_reward import (
    LabelTable,
    RemoteReward,
    UnknownMessageError,
    response_of,
    reward_app,
)

MESSAGES = ['[{"role": "user", "content": "A or B?"}]', '[{"role": "user", "content": "C or D?"}]']


def dialogue(response: str) -> str:
    return f"<|im_start|>user\nA or B?<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n<|endoftext|>"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"message": MESSAGES[0], "answer": ["<answer>2</answer>"], "question": "q"},
        {"message": MESSAGES[1], "answer": ["<answer>1</answer>"]},
        {"message": MESSAGES[1], "answer": "1"},
        {"message": "twice", "answer": ["1"]},
        {"message": "twice", "answer": ["2"]},
        {"message": "no answer"},
        {"message": "tie", "answer": ["<answer>3</answer>"]},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def client_of(data: Path, token: str | None = None) -> TestClient:
    return TestClient(reward_app(RemoteReward(RewardSection(use_judge=False), LabelTable(data), None), token=token))


def test_rewards_come_in_the_order_of_the_queries(data: Path) -> None:
    queries = [
        dialogue("<think>a</think><answer>2</answer>"),
        dialogue("<think>a</think><answer>2</answer>"),
        dialogue("so <answer>1</answer>"),
        dialogue("the answer is 1"),
    ]
    body = {"query": queries, "prompts": [MESSAGES[0], MESSAGES[1], MESSAGES[1], MESSAGES[1]]}
    assert client_of(data).post("/get_reward_mllm", json=body).json() == {"rewards": [1.5, 0.5, 1.0, 0.0]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": ["x"], "prompts": ["never seen"]}, "no row of the data set"),
        ({"query": ["x"], "prompts": ["twice"]}, "two different answers"),
        ({"query": ["x"], "prompts": []}, "1 queries, but 0 prompts"),
        ({"query": "x"}, "query"),
    ],
)
def test_what_cannot_be_scored_is_an_error_with_its_reason(data: Path, body: dict, reason: str) -> None:
    response = client_of(data).post("/get_reward_mllm", json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]


def test_a_token_is_asked_for_where_there_is_one(data: Path) -> None:
    client = client_of(data, token="t")
    body = {"query": [dialogue("<think>a</think><answer>2</answer>")], "prompts": [MESSAGES[0]]}
    assert client.post("/get_reward_mllm", json=body).status_code == 401
    assert client.post("/get_reward_mllm", json=body, headers={"Authorization": "Bearer t"}).is_success


def test_the_response_begins_after_the_first_assistant_header() -> None:
    assert response_of(dialogue("x <|im_start|>assistant\ny")) == "x <|im_start|>assistant\ny"
    assert response_of("no header<|im_end|>") == "no header"
    noisy = "<think>a<|im_end|></think><answer>1</answer>"
    assert response_of(dialogue(noisy)) == noisy, "a token inside is not what ended it"


def test_labels_are_counted_and_checked(data: Path, tmp_path: Path) -> None:
    table = LabelTable(data)
    assert (len(table), table.skipped, table.ambiguous) == (3, 2, {"twice"})
    with pytest.raises(UnknownMessageError):
        table.label("tie")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="no row has a `message`"):
        LabelTable(empty)


def test_answers_and_messages_are_read_by_the_readers_rule(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "A or B?"}]}]
    rows = [
        {"message": "number", "answer": 2},
        {"message": "double", "answer": [1.0]},
        {"message": turns, "answer": "<answer>2</answer>"},
        {"message": "two answers", "answer": "<answer>1</answer><answer>2</answer>"},
        {"message": "reasoning", "answer": "so <answer>1</answer>"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = LabelTable(path)
    assert (len(table), table.skipped) == (3, 2)
    assert [table.label(message) for message in ("number", "double")] == [2, 1]
    assert table.label(json.dumps(turns)) == table.label(json.dumps(turns, indent=1)) == 2


def test_no_network_address_without_a_token(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_r1reward.launch.serve_model import serve_labels

    monkeypatch.delenv("R1REWARD_SERVE_TOKEN", raising=False)
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{tmp_path}"\n[data]\ntrain = "{data}"\n'
        '[serve]\nhost = "0.0.0.0"\n'
    )
    with pytest.raises(ValueError, match=r"serve\.host 0\.0\.0\.0 is on the network"):
        serve_labels(load_config(run_file, []))
