from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from megatron_r1reward.cli import app

FIRST = "<think>The first.</think><answer>1</answer>"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(source: Path, output: Path, url: str, *options: str):
    return CliRunner().invoke(app, ["score", str(source), str(output), "--model", url, *options])


@pytest.fixture
def rows(tmp_path) -> Path:
    """A pair with a picture, four candidates, a missing picture, one response, no JSON, and the pair once more."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    pair = {"id": "p", "question": "Which?", "responses": ["a", "b"], "images": ["red.png"], "source": "mine"}
    table = [
        pair,
        {"question": "Best?", "responses": ["a", "b", "c", "ü"]},
        {"question": "Where?", "responses": ["a", "b"], "images": ["gone.png"]},
        {"question": "Alone?", "responses": ["a"]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in table) + '{"question": "torn\n' + json.dumps(pair) + "\n"
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    return path


def test_every_row_is_answered_or_accounted_for(scripted, rows, tmp_path) -> None:
    server, out, best = scripted(FIRST), tmp_path / "out.jsonl", tmp_path / "best.jsonl"
    done = score(rows, out, server.url, "--one-order", "--best-of", str(best))
    assert done.exit_code == 0, done.output
    found = lines(out)
    assert [row["row"] for row in found] == list(range(6))
    assert (found[0]["id"], found[0]["verdict"], found[0]["best"]) == ("p", 1, 0)
    assert found[0]["probability"] == pytest.approx(0.75)
    assert len(found[1]["rewards"]) == 4
    assert "verdict" not in found[1]
    assert "gone.png' cannot be read: No such file" in found[2]["error"]
    assert "a model that compares needs at least two" in found[3]["error"]
    assert "not a row" in found[4]["error"]
    assert found[5]["rewards"] == found[0]["rewards"]
    assert [row["response"] for row in lines(best)][::2] == ["a", "a"]
    assert lines(best)[0]["source"] == "mine"


def test_a_killed_run_goes_on_and_asks_nothing_twice(scripted, rows, tmp_path) -> None:
    server, out = scripted(FIRST), tmp_path / "out.jsonl"
    assert score(rows, out, server.url, "--one-order").exit_code == 0
    whole, asked = lines(out), len(server.requests)
    assert asked == 1 + 4  # the pair, which stands there twice, and two rounds of two
    text = out.read_text()
    out.write_text(text[: text.index("\n") + 30])  # one row, and the beginning of another
    assert score(rows, out, server.url, "--one-order").exit_code == 0
    assert lines(out) == whole
    assert len(server.requests) == asked + asked - 1
    assert score(rows, out, server.url, "--one-order").exit_code == 0
    assert len(server.requests) == asked + asked - 1


def test_what_is_asked_otherwise_is_asked_again(scripted, rows, tmp_path) -> None:
    """Another picture under the same name, another way of asking and another row are not what was answered."""
    server, out = scripted(FIRST), tmp_path / "out.jsonl"
    score(rows, out, server.url, "--one-order")
    asked = len(server.requests)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "red.png")
    score(rows, out, server.url, "--one-order")
    assert len(server.requests) == asked + 1
    score(rows, out, server.url)
    assert len(server.requests) > asked + 2


def test_errors_say_what_to_change(scripted, rows, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    done = score(rows, out, str(tmp_path))
    assert done.exit_code == 2
    assert "holds no config.json" in done.output
    assert "give one of swiss" in score(rows, out, "http://x", "--schedule", "best").output
    assert "none.jsonl is not there" in score(tmp_path / "none.jsonl", out, scripted(FIRST).url).output
    refused = score(rows, out, scripted(400).url)
    assert refused.exit_code == 2
    assert "no row of" in refused.output
