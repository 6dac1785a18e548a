"""`r1reward bench` against a local server."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from scripted_server import ScriptedServer, completion
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.report.bench_report import COLUMNS, PUBLISHED

FIRST = "<think>The first.</think><answer>1</answer>"


@pytest.fixture
def always_first() -> Iterator[ScriptedServer]:
    server = ScriptedServer([FIRST])
    yield server
    server.stop()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two pairs of one id, one of another category, and one whose picture is missing."""
    (tmp_path / "mcq").mkdir()
    (tmp_path / "short").mkdir()
    for path in ("mcq/a.png", "short/b.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / path)
    pictures = ["mcq/a.png", "mcq/a.png", "short/b.png", "short/gone.png"]
    table = [
        {"id": name, "prompt": "Which?", "chosen": f"a{i}", "rejected": "b", "chosen_reason": "", "image": pictures[i]}
        for i, name in enumerate(("x", "x", "y", "z"))
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def bench(rows: Path, out: Path, url: str, *options: str, name: str = "mm-rlhf-rewardbench"):
    return CliRunner().invoke(app, ["bench", name, str(rows), "--model", url, "--out", str(out), *options])


def test_both_numbers_stand_side_by_side_and_every_row_is_accounted_for(always_first, rows, tmp_path) -> None:
    done = bench(rows, tmp_path / "out", always_first.url)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (found["rows"], found["unusable"], found["failed"]) == (4, 1, [])
    assert found["official"]["groups"]["mcq"]["accuracy"] == {"right": 2, "counted": 2}
    assert found["official"]["overall"]["accuracy_plus"] == {"right": 2, "counted": 3}
    assert found["overall"]["greedy"]["better_first"]["mean"] == 0.75  # the pair without its picture is not right
    assert found["overall"]["greedy"]["better_second"]["mean"] == 0.0
    assert found["overall"]["greedy"]["agreement"]["mean"] == 0.0
    judged = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert sorted((line["row"], line["order"], line["right"]) for line in judged) == [
        (0, "12", True), (0, "21", False), (1, "12", True), (1, "21", False), (2, "12", True), (2, "21", False),
    ]  # fmt: skip
    assert {line["text"] for line in judged} == {FIRST}
    assert {(line["row"], line["id"]) for line in judged} == {(0, "x"), (1, "x"), (2, "y")}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 40, 400, 10_000])
def test_a_run_that_was_killed_anywhere_asks_and_writes_nothing_twice(always_first, rows, tmp_path, keep) -> None:
    out = tmp_path / "out"
    assert bench(rows, out, always_first.url).exit_code == 0
    record, result = out / "judgements.jsonl", (out / "bench.json").read_text()
    whole = record.read_bytes()
    record.write_bytes(whole[:keep])
    lost = 6 - whole[:keep].count(b"\n")
    assert bench(rows, out, always_first.url).exit_code == 0
    assert len(always_first.requests) == 6 + lost
    assert sorted(record.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert (out / "bench.json").read_text() == result


SEEN = {(255, 0, 0): "asked", (0, 128, 0): "good", (0, 0, 255): "bad"}


def asked_of(request: dict) -> list[str]:
    """What stands in a request's turn, pictures by what they show."""
    found = []
    for part in request["messages"][0]["content"]:
        if part["type"] == "text":
            found.append(part["text"])
        else:
            picture = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            found.append(SEEN[Image.open(io.BytesIO(picture)).convert("RGB").getpixel((0, 0))])
    return found


@pytest.mark.parametrize("own_prompt", [True, False])
def test_images_inside_responses_are_asked_about_in_both_orders(always_first, tmp_path, own_prompt) -> None:
    """One response shows a picture, the other three frames of a video; they change places with their texts."""
    for color, name in (("red", "asked"), ("green", "good"), ("blue", "bad")):
        Image.new("RGB", (28, 28), color).save(tmp_path / f"{name}.png")
    row = {
        "prompt": "Draw it.", "chosen": "Here<image>it is", "rejected": "<image><image><image>", "image": "asked.png",
        "chosen_images": ["good.png"], "rejected_images": ["bad.png"] * 3, "category": "edits",
    }  # fmt: skip
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({**row, "prompt": text}) + "\n" for text in ("Draw it.", "Again.")))
    options = []
    if not own_prompt:
        (tmp_path / "prompt.txt").write_text("Q {question} A {response_1} B {response_2}")
        options = ["--prompt", str(tmp_path / "prompt.txt")]
    command = ["bench", str(path), "--model", always_first.url, "--out", str(out), *options]
    done = CliRunner().invoke(app, command)  # a file alone is a set of pairs
    assert done.exit_code == 0, done.output
    found = json.loads((out / "bench.json").read_text())
    assert (found["benchmark"], found["rows"], found["unusable"]) == ("pairs", 2, 0)
    assert found["overall"]["greedy"]["better_first"]["mean"] == 1.0
    assert found["overall"]["greedy"]["better_second"]["mean"] == 0.0
    good, bad = ["Here", "good", "it is"], ["bad", "bad", "bad"]
    wanted = {("asked", *good, *bad), ("asked", *bad, *good)}
    orders = set()
    for request in always_first.requests:
        parts = asked_of(request)
        words = [re.sub(r".*(Here)$|^(it is).*", r"\1\2", part, flags=re.DOTALL) for part in parts]
        orders.add(tuple(word for word in words if word in ("asked", "good", "bad", "Here", "it is")))
        assert "<image>" not in "".join(parts)
    assert orders == wanted
    assert len(always_first.requests) == 4
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(always_first.requests) == 4, "a second run asks nothing"
    other = {**row, "chosen": "Here<image>", "chosen_images": ["bad.png"]}
    path.write_text(path.read_text() + json.dumps(other) + "\n")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(always_first.requests) == 6, "another picture in a response is another question"


def test_what_cannot_be_meant_is_refused(always_first, rows, tmp_path) -> None:
    done = bench(rows, tmp_path / "out", always_first.url, name="vlrb")
    assert done.exit_code != 0
    assert "give one of vl-rewardbench" in done.output
    for name in ("vl-rewardbench", "gone.jsonl"):
        done = CliRunner().invoke(app, ["bench", name, "--model", always_first.url, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert f"bench {name}: name a FILE of pairs, or one of vl-rewardbench" in done.output.replace("\n", " ")
    done = bench(rows, tmp_path / "out", always_first.url, "--legacy")
    assert done.exit_code != 0
    assert "no legacy grouping" in done.output
    rows.write_text(rows.read_text() + json.dumps({**json.loads(rows.read_text().splitlines()[0]), "image": "a.png"}))
    done = bench(rows, tmp_path / "out", always_first.url)
    assert done.exit_code == 2
    assert "no category of MM-RLHF-RewardBench in the path 'a.png'" in done.output
    assert always_first.requests == [], "nobody is asked before"


def test_requests_that_failed_fail_the_command_and_are_asked_again(always_first, rows, tmp_path) -> None:
    assert bench(rows, tmp_path / "out", always_first.url).exit_code == 0
    record = tmp_path / "out" / "judgements.jsonl"
    record.write_text("".join(f"{line}\n" for line in record.read_text().splitlines()[:5]))
    always_first.stop()
    done = bench(rows, tmp_path / "out", always_first.url)
    assert done.exit_code == 2
    assert "1 of 6 requests failed" in done.output
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == 4


@pytest.mark.slow
def test_one_set_of_judgements_answers_greedy_voting_and_every_category(always_first, rows, tmp_path) -> None:
    out = tmp_path / "out"
    assert bench(rows, out, always_first.url, "--samples", "3").exit_code == 0
    assert len(always_first.requests) == 3 * 2 * (1 + 3)
    assert [request["temperature"] for request in always_first.requests].count(0.0) == 6
    assert bench(rows, out, always_first.url, "--samples", "5").exit_code == 0
    assert len(always_first.requests) == 3 * 2 * (1 + 5), "only the two new samples of each were asked for"
    found = json.loads((out / "bench.json").read_text())
    assert list(found["overall"]["voting"]) == ["1", "3", "5"]
    mcq, short = found["categories"]["mcq"], found["categories"]["short"]
    assert (mcq["pairs"], short["pairs"]) == (2, 2)
    assert mcq["greedy"]["better_first"]["mean"] == mcq["any_correct"]["5"]["mean"] * 2 == 1.0
    assert short["voting"]["5"]["mean"] == 0.25  # the pair without its picture is not right
    assert mcq["voting"]["1"]["low"] == 0.0, "two pairs of one id are one item, which says nothing about others"
    by_method = {point["method"]: point for point in found["vote_budget"]["points"]}
    assert set(by_method) == {"one order", "both orders", "adaptive"}
    text, picture = (out / "bench.md").read_text(), (out / "bench.svg").read_text()
    assert "any-correct@5" in text
    assert "generated tokens per pair" in picture
    assert "voting@5" in picture


class TellingModel(ScriptedServer):
    """Says 1 in both orders; the answer's token says how sure that is: 0.9 where the better response stands first."""

    def _reply(self, body: dict) -> tuple[int, str, str]:
        self._take(body)
        assert body["logprobs"] is True
        right = re.search(r"\[Response 1\]:\s+a\d", body["messages"][0]["content"][-1]["text"])
        p = 0.9 if right else 0.6
        answer = json.loads(completion(FIRST))
        top = [{"token": digit, "logprob": math.log(q)} for digit, q in (("1", p), ("2", 1 - p))]
        tokens = [{"token": text, "logprob": 0.0, "top_logprobs": []} for text in (FIRST.split("1")[0], "</answer>")]
        tokens.insert(1, {"token": "1", "logprob": math.log(p), "top_logprobs": top})
        answer["choices"][0]["logprobs"] = {"content": tokens}
        return 200, "application/json", json.dumps(answer)


@pytest.mark.slow
def test_votes_are_weighted_by_what_the_answers_token_says(rows, tmp_path) -> None:
    model, out = TellingModel([""]), tmp_path / "out"
    try:
        assert bench(rows, out, model.url, "--samples", "3").exit_code == 0
    finally:
        model.stop()
    lines = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    found = {(line["order"], line["right"]): line["p_first"] for line in lines}
    assert found == {("12", True): pytest.approx(0.9), ("21", False): pytest.approx(0.4)}
    points = json.loads((out / "bench.json").read_text())["vote_budget"]["points"]
    accuracy = {(one["method"], one["setting"]): one["accuracy"] for one in points}
    # Of four pairs one cannot be judged; whole votes are a tie in the others, weighted ones are not: 0.9 against 0.6.
    assert accuracy["both orders", "3 + 3"] == 0.375
    assert accuracy["both orders, by log-prob", "3 + 3"] == 0.75


class SeeingModel(ScriptedServer):
    """Greedily and in some samples it is right for a reason; in the others it is wrong, and its reason is another."""

    def _take(self, body: dict) -> str:
        super()._take(body)
        text = body["messages"][0]["content"][-1]["text"]
        right = 1 if re.search(r"\[Response 1\]:\s+a\d", text) else 2
        lucky = body["temperature"] == 0 or body["seed"] % 3 == 0
        return (
            f"<think>It fits.</think><answer>{right}</answer>"
            if lucky
            else f"<think>Odd.</think><answer>{3 - right}</answer>"
        )


class SeeingJudge(ScriptedServer):
    def _take(self, body: dict) -> str:
        super()._take(body)
        return "0" if "Odd." in str(body["messages"]) else "1"


@pytest.mark.slow
def test_a_judge_is_asked_once_about_each_sample_and_its_votes_are_left_out(rows, tmp_path) -> None:
    out, model, judge = tmp_path / "out", SeeingModel([""]), SeeingJudge([""])
    try:
        assert bench(rows, out, model.url, "--samples", "6").exit_code == 0
        assert "There are no judge-filtered votes: no consistency judge" in (out / "bench.md").read_text()
        done = bench(rows, out, model.url, "--samples", "6", "--judge", judge.url)
        assert done.exit_code == 0, done.output
        assert len(model.requests) == 3 * 2 * (1 + 6), "the samples on record are judged"
        asked = len(judge.requests)
        assert asked <= 4, "equal questions are asked once"
        lines = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
        said = [line for line in lines if line["temperature"] > 0]
        assert {line["judged"]["by"] for line in said} == {judge.url}
        assert all(line["judged"]["consistent"] == ("Odd." not in line["text"]) for line in said)
        assert not any("judged" in line for line in lines if line["temperature"] == 0)
        found = json.loads((out / "bench.json").read_text())["vote_budget"]
        odd = sum("Odd." in line["text"] for line in said)
        assert found["judged"] == {
            "judge": judge.url, "consistent": len(said) - odd, "inconsistent": odd, "unknown": 0,
        }  # fmt: skip
        accuracy = {(one["method"], one["setting"]): one["accuracy"] for one in found["points"]}
        assert accuracy["both orders, judge-filtered", "6 + 6"] > accuracy["both orders", "6 + 6"]
        assert f"as {judge.url} says" in (out / "bench.md").read_text()
        record = (out / "judgements.jsonl").read_text()
        assert bench(rows, out, model.url, "--samples", "6", "--judge", judge.url).exit_code == 0
        assert (len(judge.requests), (out / "judgements.jsonl").read_text()) == (asked, record)
        assert "give --samples" in bench(rows, out, model.url, "--judge", judge.url).output
    finally:
        model.stop()
        judge.stop()


def test_the_verdicts_of_another_prompt_are_read_again_without_asking(rows, tmp_path) -> None:
    server = ScriptedServer(["I looked. Verdict: [[B]]"])
    prompt = tmp_path / "prompt.txt"
    prompt.write_text('{"q": {question}} A: {response_1} B: {response_2}')
    try:
        options = ("--prompt", str(prompt), "--request", '{"max_tokens": null, "max_completion_tokens": 9}')
        assert bench(rows, tmp_path / "out", server.url, *options).exit_code == 0
        request = server.requests[0]
        assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]
        assert '{"q": Which?} A: ' in request["messages"][0]["content"][1]["text"]
        assert "max_tokens" not in request
        assert "logprobs" not in request
        assert request["max_completion_tokens"] == 9
        first = json.loads((tmp_path / "out" / "bench.json").read_text())
        assert first["official"]["without_verdict"] == 4
        assert bench(rows, tmp_path / "out", server.url, *options, "--verdict", "brackets").exit_code == 0
        assert len(server.requests) == 6
        again = json.loads((tmp_path / "out" / "bench.json").read_text())
        assert again["overall"]["greedy"]["better_second"]["mean"] == 0.75
        assert again["overall"]["greedy"]["better_first"]["mean"] == 0.0
        record = (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()
        assert [json.loads(line)["choice"] is None for line in record] == [False] * 6
    finally:
        server.stop()


def test_published_scores_stand_beside_ours_with_their_sources(always_first, rows, tmp_path) -> None:
    assert bench(rows, tmp_path / "out", always_first.url).exit_code == 0
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "| R1-Reward, greedy | 80.95 | 89.19 | 82.35 | 75.00 | 72.00 | 80.59 | 54.35 | arXiv 2505.02835 |" in text
    assert f"| **{always_first.url}** | 100.00 | - | 50.00 | - | - | 75.00 | 66.67 | this run |" in text
    for name, table in PUBLISHED.items():
        assert {len(one.figures) for one in table} == {len(COLUMNS[name])}
        assert all(one.source.startswith("arXiv 2") for one in table)
