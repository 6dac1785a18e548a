"""Which rows a run trains on, and in which of its steps."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_r1reward.config.data_section import DataSection
from megatron_r1reward.data.difficulty import AttemptRecord, append_record
from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.loader import PromptLoader
from megatron_r1reward.data.preference import read_sft_examples
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import messages_of
from megatron_r1reward.data.selection import SelectedRows, select_rows, selection
from megatron_r1reward.types import Preference, Prompt

CATEGORIES = ("count", "read", "colour")


@pytest.fixture
def rows() -> list[Preference]:
    """Twelve rows; row i is of category i % 3, all with the label 2."""
    return [
        Preference(id=f"r{i}", question=f"Which of {i}?", responses=("A", "B"), label=2, image_paths=(),
                   metadata={"category": CATEGORIES[i % 3]})
        for i in range(12)
    ]  # fmt: skip


@pytest.fixture
def attempts(rows: list[Preference], tmp_path: Path) -> Path:
    """The annotator needed one attempt for rows 0 to 3, two for 4 to 7, and never got 8 to 10; 11 was not asked."""
    path, keys = tmp_path / "attempts.jsonl", ContentKeys()
    for i, row in enumerate(rows[:11]):
        answers = ((2,), (1, 2), (1, None, 1))[i // 4]
        outcomes = tuple(answer == 2 for answer in answers)
        append_record(path, AttemptRecord(preference_id=row.id, attempts=outcomes, answers=answers,
                                          content=keys.question(row)))  # fmt: skip
    return path


@pytest.fixture
def judgements(rows: list[Preference], tmp_path: Path) -> Path:
    """A model is right about row i in i of 12 judgements."""
    path, keys = tmp_path / "judgements.jsonl", ContentKeys()
    lines = [
        {"content": keys.question(row), "model": "m", "choice": 2 if sample < i else (1 if sample % 2 else None)}
        for i, row in enumerate(rows)
        for sample in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chosen(rows: list[Any], **section: Any) -> SelectedRows[Any]:
    data = DataSection.model_validate({"train": "x.jsonl", **section})
    return select_rows(rows, data, batch_size=4, steps=lambda rows: 20)


def ids(found: SelectedRows[Any]) -> list[int]:
    return [int(row.id[1:]) for row in found.rows]


def test_rows_by_category_difficulty_and_accuracy(
    rows: list[Preference], attempts: Path, judgements: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ids(chosen(rows)) == list(range(12))
    assert ids(chosen(rows, categories=["count", "colour"])) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert ids(chosen(rows, attempts=attempts, difficulty=[1, 1])) == [0, 1, 2, 3]
    with caplog.at_level(logging.WARNING):
        assert ids(chosen(rows, attempts=attempts, difficulty=[2, 4])) == [4, 5, 6, 7, 8, 9, 10]
    assert "data.difficulty: 1 of 12 rows are not in" in caplog.text
    assert ids(chosen(rows, judgements=judgements, accuracy=[0.25, 0.75])) == [3, 4, 5, 6, 7, 8, 9]
    both = chosen(
        rows, attempts=attempts, judgements=judgements, categories=["read"], difficulty=[2, 2], accuracy=[0.4, 1.0]
    )
    assert ids(both) == [7]


def test_what_was_said_of_a_row_belongs_to_its_content_and_a_corrected_label_counts(
    rows: list[Preference], attempts: Path, judgements: Path
) -> None:
    renamed = [dataclasses.replace(row, id=f"r{11 - i}") for i, row in enumerate(rows)][::-1]  # r0 was r11
    assert ids(chosen(renamed, judgements=judgements, accuracy=[0.9, 1.0])) == [0]
    assert sorted(ids(chosen(renamed, attempts=attempts, difficulty=[1, 1]))) == [8, 9, 10, 11]
    edited = [dataclasses.replace(rows[0], question="Another?"), dataclasses.replace(rows[4], label=1), *rows[5:]]
    assert ids(chosen(edited, attempts=attempts, difficulty=[1, 1])) == [4], "its first attempt said 1"
    assert ids(chosen(edited, judgements=judgements, accuracy=[0.3, 0.34])) == [4], "4 of 12 said 1"


class Builder:
    def build(self, preference: Preference, *, swapped: bool, occurrence: int | str = 0) -> Prompt:
        return Prompt(
            id=f"{preference.id}/{'21' if swapped else '12'}/{occurrence}", preference_id=preference.id, token_ids=(1,),
            image_paths=(), label=1, swapped=swapped,
        )  # fmt: skip


def loader_of(found: SelectedRows[Any]) -> PromptLoader:
    section = DataSection(train=Path("x.jsonl"))
    return PromptLoader(found.rows, Builder(), section, seed=0, stages=found.stages)  # type: ignore[arg-type]


def test_a_curriculum_goes_from_stage_to_stage(
    rows: list[Preference], attempts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Easy rows for three steps, then harder ones for two passes (2 x 4 rows: two steps), then those of a list."""
    hard = tmp_path / "hard.json"
    hard.write_text(json.dumps(selection(rows, {"r8", "r9", "r10", "r11"})))
    stages = [{"until_step": 3, "difficulty": [1, 1]}, {"epochs": 2, "difficulty": [2, 2]}, {"select": hard}]
    with caplog.at_level(logging.INFO):
        found = chosen(rows, attempts=attempts, curriculum=stages, categories=["count", "read"])
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 3), (3, 5), (5, None)]
    assert "data.curriculum stage 1 of 3, steps 1 to 3: 3 rows (difficulty [1, 1]), 4.00 passes" in caplog.text
    assert "count 2, read 1" in caplog.text
    assert f"stage 3 of 3, steps 6 to 20: 2 rows (select {hard}), 30.00 passes" in caplog.text
    loader = loader_of(found)
    held = [{prompt.preference_id for prompt in loader.batch(step, 4)} for step in range(8)]
    assert held[:3] == [{"r0", "r1", "r3"}] * 3
    assert held[3] | held[4] == {"r4", "r6", "r7"}
    assert held[5:] == [{"r9", "r10"}] * 3
    names = [prompt.id for step in range(8) for prompt in loader.batch(step, 4)]
    assert len(set(names)) == len(names), "no prompt has the name of another"


def test_a_run_goes_on_in_the_middle_of_a_stage(rows: list[Preference], attempts: Path) -> None:
    """Everything follows from the step: a loader that starts there shows what the first one would have shown, also
    when the rows have other names, as the file was written anew."""
    section = {"attempts": attempts, "curriculum": [{"until_step": 4, "difficulty": [1, 2]}, {}]}
    whole = chosen(rows, **section)
    first = loader_of(whole)
    seen = {step: [prompt.preference_id for prompt in first.batch(step, 4)] for step in range(8)}
    again = loader_of(chosen(rows, **section))
    for step in (7, 2, 5):  # whatever was asked before
        assert [prompt.preference_id for prompt in again.batch(step, 4)] == seen[step]
    renamed = chosen([dataclasses.replace(row, id=f"x{row.id}") for row in rows], **section)
    assert renamed.description == whole.description
    assert chosen(rows, **section, categories=["count"]).description != whole.description
    assert chosen(rows).description is None


def test_what_holds_nothing_or_is_never_reached_is_said(
    rows: list[Preference], attempts: Path, judgements: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(message: str, **section: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            chosen(rows, **section)
        assert "\n" not in str(error.value)

    refused(r"data.curriculum stage 2: no row of 12 is left by difficulty \[7, 8\]: widen them", attempts=attempts,
            curriculum=[{"until_step": 3}, {"difficulty": [7, 8]}])  # fmt: skip
    refused("data.curriculum stage 1: none of its rows is among those that the rest of", categories=["read"],
            curriculum=[{"until_step": 3, "categories": ["count"]}, {}])  # fmt: skip
    refused("data.categories: no row has 'cuont'; there are colour, count, read", categories=["cuont"])
    refused("data.curriculum stage 2: until_step 3 is past: the stages before end at step 6",
            curriculum=[{"epochs": 2}, {"until_step": 3}, {}])  # fmt: skip
    gone = attempts.with_name("gone.jsonl")
    refused("data.attempts .*gone.jsonl cannot be read: No such file", attempts=gone, difficulty=[1, 1])
    refused("data.judgements .* is no judgements.jsonl", judgements=gone, accuracy=[0, 1])
    judgements.write_text(judgements.read_text() + json.dumps({"content": "c", "model": "other", "choice": 1}) + "\n")
    refused("holds judgements of 2 models", judgements=judgements, accuracy=[0, 1])
    judgements.write_text(json.dumps({"key": "of an earlier version", "choice": 1}) + "\n")
    refused("does not say what its rows are about", judgements=judgements, accuracy=[0, 1])
    with caplog.at_level(logging.WARNING):
        chosen(rows, curriculum=[{"until_step": 20}, {}])
    assert "stage 2 of 2 begins after step 20, and the run has 20: it is never reached" in caplog.text


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"difficulty": [2, 1]}, "goes from the larger to the smaller"),
        ({"curriculum": [{"until_step": 1, "accuracy": [0, 1]}, {}]}, "stage 1: accuracy needs data.judgements"),
        ({"curriculum": [{"until_step": 5}]}, "stage 1 is the last one and goes on to the run's last step"),
        ({"curriculum": [{}, {}]}, "stage 1 needs until_step or epochs"),
        ({"curriculum": [{"until_step": 5, "epochs": 1}, {}]}, "stage 1 needs until_step or epochs, one of them"),
        ({"curriculum": [{"until_step": 5}, {"until_step": 5}, {}]}, "stage 2 ends at step 5, and the one before at 5"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSection.model_validate({"train": "x.jsonl", **section})


def test_difficulty_comes_from_the_annotator(attempts: Path) -> None:
    DataSection(train=Path("x.jsonl"), attempts=attempts, difficulty=(1, 2)).check_attempts()
    with pytest.raises(ValueError, match=r"data.difficulty needs data.attempts, the attempts.jsonl"):
        DataSection(train=Path("x.jsonl"), difficulty=(1, 2)).check_attempts()
    stages = [{"until_step": 3, "difficulty": [1, 2]}, {}]
    with pytest.raises(ValueError, match=r"data.curriculum stage 1: difficulty needs data.attempts"):
        DataSection.model_validate({"train": "x.jsonl", "curriculum": stages}).check_attempts()


def examples(rows: list[Preference]) -> list[SftExample]:
    """The rows as `data sft` writes them, without the attempts that were needed."""
    return [
        SftExample(id=row.id, messages=tuple(messages_of(row)), image_paths=(), response="<answer>2</answer>",
                   metadata=row.metadata, label=row.label)
        for row in rows
    ]  # fmt: skip


def test_supervised_rows_are_selected_by_what_they_or_the_files_say(
    rows: list[Preference], attempts: Path, judgements: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By their own column, or by what is known of the pair that they ask about."""
    chats = examples(rows)
    assert ids(chosen(chats, categories=["count", "colour"])) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert ids(chosen(chats, attempts=attempts, difficulty=[1, 1])) == [0, 1, 2, 3]
    assert ids(chosen(chats, judgements=judgements, accuracy=[0.25, 0.75])) == [3, 4, 5, 6, 7, 8, 9]
    hard = tmp_path / "hard.json"
    hard.write_text(json.dumps(selection(rows, {"r8", "r9"})))  # of the preferences, as `annotate` writes it
    renamed = [dataclasses.replace(row, id=f"r{11 - i}") for i, row in enumerate(chats)]
    assert sorted(ids(chosen(renamed, select=hard))) == [2, 3]
    said = [dataclasses.replace(row, difficulty=1 + i % 3 if i else None) for i, row in enumerate(chats)]
    with caplog.at_level(logging.WARNING):
        assert ids(chosen(said, difficulty=[2, 2])) == [1, 4, 7, 10]
    assert "data.difficulty: 1 of 12 rows do not say it and are left out" in caplog.text
    found = chosen(said, curriculum=[{"until_step": 2, "difficulty": [1, 1]}, {"difficulty": [3, 3]}])
    assert [len(stage.rows) for stage in found.stages] == [3, 4]
    with pytest.raises(
        ValueError, match=r"data.difficulty: no row has the column `difficulty` that `r1reward data sft`"
    ):
        chosen(chats, difficulty=[1, 1])
    about_nothing = [dataclasses.replace(row, label=None) for row in chats]
    with pytest.raises(ValueError, match="no row of 12 is left by accuracy"):
        chosen(about_nothing, judgements=judgements, accuracy=[0.0, 1.0])


def test_supervised_rows_bring_what_they_are_selected_by(tmp_path: Path) -> None:
    row = {"message": [{"role": "user", "content": "Which?"}], "response": "<answer>2</answer>"}
    told = [
        {"category": "count", "source": "a", "answer": ["<answer>2</answer>"], "difficulty": 2},
        {"answer": "A chat about anything.", "difficulty": 1.0},
        {"difficulty": "hard"},
        {"difficulty": True, "answer": None},
    ]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({**row, **more}) + "\n" for more in told))
    first, *others = read_sft_examples(path).examples
    assert (first.metadata, first.label, first.difficulty) == ({"category": "count", "source": "a"}, 2, 2)
    assert [(one.label, one.difficulty) for one in others] == [(None, 1), (None, None), (None, None)]
