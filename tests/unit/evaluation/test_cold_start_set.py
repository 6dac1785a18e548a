"""The first right, well-formed reasoning of each preference becomes a supervised row; the rest is accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from scripted_server import Action, ScriptedServer
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.data.difficulty import AttemptRecord, Reply, append_record, read_records
from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.importing import preference_row
from megatron_r1reward.data.preference import read_sft_examples
from megatron_r1reward.evaluation.cold_start_set import ReasoningFilter, build_cold_start, card, script_of
from megatron_r1reward.files import write_jsonl
from megatron_r1reward.types import Label, Preference

RIGHT = "<think>One is right.</think><answer>1</answer>"
WRONG = "<think>Two is right.</think><answer>2</answer>"
LOOSE = "One, so <answer>1</answer>"
CHINESE = "<think>\u7b2c\u4e00\u4e2a\u7b54\u6848\u662f\u5bf9\u7684\u3002</think><answer>1</answer>"


@pytest.fixture
def make(tmp_path: Path):
    """A preference about one picture, and the record of what was said about it."""
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")

    def pair(name: str, *texts: str, label: Label = 1, finish: str = "stop") -> tuple[Preference, AttemptRecord]:
        preference = Preference(
            id=name, question=name, responses=("A", "B"), label=label, image_paths=(str(tmp_path / "a.png"),)
        )
        record = AttemptRecord(
            preference_id="another id",
            attempts=(False,) * len(texts),
            answers=(None,) * len(texts),
            content=ContentKeys().question(preference),
            asked={"model": "strong"},
            replies=tuple(
                Reply(text=text, seed=seed, finish_reason=finish, prompt_tokens=10, completion_tokens=5, cost=0.5)
                for seed, text in enumerate(texts)
            ),
        )
        return preference, record

    return pair


def test_the_first_right_well_formed_reasoning_counts(make, tmp_path: Path) -> None:
    pairs = [
        make("easy", RIGHT),
        make("second", WRONG, RIGHT, RIGHT + " "),
        make("loose first", LOOSE, RIGHT),
        make("never", WRONG, WRONG, WRONG),
        make("loose", LOOSE),
        make("cut", RIGHT, finish="length"),
        make("two", WRONG, label=2),
    ]
    stranger, _ = make("never asked", RIGHT)
    preferences, records = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    path = tmp_path / "attempts.jsonl"
    for record in records:
        append_record(path, record)
    built = build_cold_start([*preferences, stranger], read_records(path), keep=ReasoningFilter())
    assert {row["id"]: row["difficulty"] for row in built.rows} == {"easy": 1, "second": 2, "loose first": 2, "two": 1}
    assert built.counts == {
        "used": 4,
        "never right": 1,
        "right, but not well formed": 1,
        "right, but cut off": 1,
        "not annotated": 1,
    }
    assert built.labels == {"1": 3, "2": 1}
    assert (built.tokens, built.cost) == (15 * 12, 0.5 * 12)
    write_jsonl(tmp_path / "sft.jsonl", built.rows)
    examples = read_sft_examples(tmp_path / "sft.jsonl").examples  # what `sft` reads
    assert [example.response for example in examples] == [RIGHT, RIGHT, RIGHT, WRONG]
    assert examples[0].image_paths == preferences[0].image_paths
    assert "| never right | 1 |" in card(built)
    assert json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])["annotator"] == "strong"


def test_a_label_that_was_corrected_decides_anew(make) -> None:
    preference, record = make("pair", WRONG, RIGHT, label=2)
    built = build_cold_start([preference], [record], keep=ReasoningFilter())
    assert built.rows[0]["response"] == WRONG


def test_reasonings_are_filtered_by_choice(make) -> None:
    pairs = [make("plain", RIGHT), make("han", CHINESE), make("long", RIGHT.replace("One", "One " * 50))]
    preferences, records = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def kept(**options: object) -> list[str]:
        return [row["id"] for row in build_cold_start(preferences, records, keep=ReasoningFilter(**options)).rows]

    assert kept() == ["plain", "han", "long"]
    assert kept(max_characters=100) == ["plain", "han"]
    assert kept(min_characters=100) == ["long"]
    assert kept(script="latin") == ["plain", "long"]
    assert kept(script="CJK") == ["han"]
    assert script_of("\u0430\u0431") == "cyrillic"


def test_the_judge_has_the_last_word(make) -> None:
    pairs = [make("sound", RIGHT), make("odd", RIGHT.replace("One", "Two"))]
    asked = []

    def judge(cases):
        asked.extend(cases)
        return ["inconsistent" if "Two" in reasoning else "consistent" for reasoning, _ in cases]

    built = build_cold_start(
        [pair[0] for pair in pairs], [pair[1] for pair in pairs], keep=ReasoningFilter(), judge=judge
    )
    assert [row["id"] for row in built.rows] == ["sound"]
    assert asked == [("One is right.", 1), ("Two is right.", 1)]
    assert built.counts["not consistent, says the judge"] == 1


class Judge(ScriptedServer):
    def _take(self, body: dict) -> Action:
        super()._take(body)
        text = str(body["messages"])
        return 500 if self.fails and "Broken" in text else "0" if "Odd" in text else "1"

    fails = True


def test_the_command_filters_by_judge_length_script_and_category_and_says_so(make, tmp_path: Path) -> None:
    """What the judge did not answer is no verdict of its own, and is asked again by the same command."""
    said = {
        "sound": RIGHT, "odd": RIGHT.replace("One", "Odd"), "broken": RIGHT.replace("One", "Broken"), "han": CHINESE,
        "short": "<think>1</think><answer>1</answer>", "other": RIGHT,
    }  # fmt: skip
    rows = []
    for name, text in said.items():
        preference, record = make(name, text)
        rows.append({**preference_row(preference), "category": "b" if name == "other" else "a"})
        append_record(tmp_path / "run" / "attempts.jsonl", record)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    judge, out = Judge([""]), tmp_path / "sft"
    (tmp_path / "run.toml").write_text(
        f'[run]\noutput_dir = "{tmp_path}/run"\n[model]\npath = "{tmp_path}"\n[data]\ntrain = "{tmp_path}/rows.jsonl"\n'
        f'categories = ["a"]\n[judge]\nurls = ["{judge.url}"]\nretries = 0\nmax_calls_per_step = 1\n'
    )
    command = ["data", "sft", str(tmp_path / "run.toml"), "--out", str(out), "--judge", "--min-characters", "5"]
    try:
        assert CliRunner().invoke(app, [*command, "--script", "latin"]).exit_code == 0
        counts = {
            "used": 1, "not consistent, says the judge": 1, "without a verdict of the judge": 1, "another script": 1,
            "too short": 1,
        }  # fmt: skip
        assert json.loads((out / "sft.json").read_text())["counts"] == counts
        assert all(f"| {reason} | {count} |" in (out / "README.md").read_text() for reason, count in counts.items())
        asked, judge.fails = len(judge.requests), False
        assert CliRunner().invoke(app, [*command, "--script", "latin"]).exit_code == 0
        assert [json.loads(line)["id"] for line in (out / "sft.jsonl").read_text().splitlines()] == ["sound", "broken"]
        assert len(judge.requests) == asked + 1
    finally:
        judge.stop()
