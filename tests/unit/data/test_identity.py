"""Rows and models are what they hold: under another name the same, under the same name another."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_r1reward.data.curriculum import Curriculum
from megatron_r1reward.data.identity import ContentKeys, model_identity
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.selection import keep_selected, selection
from megatron_r1reward.types import Preference


@pytest.fixture
def rows(tmp_path: Path) -> list[Preference]:
    found = []
    for index in range(4):
        path = tmp_path / f"{index}.png"
        path.write_bytes(bytes([index]) * 100)
        found.append(
            Preference(
                id=f"row-{index}", question="Which?", responses=("A", f"B{index}"), label=1, image_paths=(str(path),)
            )
        )
    return found


CHANGES: list[dict[str, Any]] = [
    {"question": "Which one?"}, {"responses": ("A", "C")}, {"responses": ("B0", "A")}, {"label": 2},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_what_it_says(rows: list[Preference], change: dict[str, Any]) -> None:
    keys, row = ContentKeys(), rows[0]
    other = dataclasses.replace(row, **change)
    assert keys.row(other) != keys.row(row)
    assert (keys.question(other) == keys.question(row)) == ("label" in change)
    renamed = dataclasses.replace(row, id="elsewhere", metadata={"category": "new"})
    assert keys.row(renamed) == keys.row(row)


def test_the_bytes_of_an_image_count_and_its_place_does_not(rows: list[Preference], tmp_path: Path) -> None:
    before = ContentKeys().row(rows[0])
    moved = tmp_path / "moved.png"
    moved.write_bytes(Path(rows[0].image_paths[0]).read_bytes())
    assert ContentKeys().row(dataclasses.replace(rows[0], image_paths=(str(moved),))) == before
    Path(rows[0].image_paths[0]).write_bytes(b"another picture")
    assert ContentKeys().row(rows[0]) != before


def test_a_supervised_row_holds_its_response() -> None:
    message = ({"role": "user", "content": [{"type": "text", "text": "hi"}]},)
    row = SftExample(id="a", messages=message, image_paths=(), response="yes")
    assert ContentKeys().row(row) != ContentKeys().row(dataclasses.replace(row, response="no"))


def test_other_weights_in_the_same_folder_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = np.arange(3_000_000, dtype=np.float32)  # more than is read of one file
    save_file({"w": weights}, tmp_path / "model.safetensors")
    first = model_identity(tmp_path)
    assert model_identity(tmp_path) == first
    save_file({"w": weights + 1}, tmp_path / "model.safetensors")
    second = model_identity(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({first, second, model_identity(tmp_path)}) == 3
    with pytest.raises(ValueError, match="not a folder"):
        model_identity(tmp_path / "none")


def write(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_a_selection_keeps_what_is_still_the_same(
    rows: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "hard.json", selection(rows, {"row-1", "row-2", "row-3"}))
    assert [row.id for row in keep_selected(rows, path)] == ["row-1", "row-2", "row-3"]
    assert caplog.text == ""
    edited = [
        rows[0],
        dataclasses.replace(rows[1], label=2),  # corrected: nobody knows how hard it is now
        dataclasses.replace(rows[3], id="row-2"),  # the file was sorted anew
        dataclasses.replace(rows[2], id="row-3"),
    ]
    with caplog.at_level(logging.WARNING):
        kept = keep_selected(edited, path)
    assert [row.id for row in kept] == ["row-2", "row-3"]
    assert "1 of 3 rows have other texts, images or labels than when they were selected, e.g. 'row-1'" in caplog.text
    with pytest.raises(ValueError, match=r"3 of 3 rows have other texts.*select again"):
        keep_selected([dataclasses.replace(row, question="?") for row in rows], path)


def test_a_selection_by_difficulty_says_nothing_about_rows_without_a_label(
    rows: list[Preference], tmp_path: Path
) -> None:
    path = write(tmp_path / "ids.json", ["row-2"])
    mixed = [dataclasses.replace(rows[0], label=None), *rows[1:]]
    assert [row.id for row in keep_selected(mixed, path)] == ["row-0", "row-2"]
    assert ContentKeys().row(mixed[0]) != ContentKeys().row(rows[0])


def test_a_list_of_ids_selects_by_id(rows: list[Preference], tmp_path: Path) -> None:
    path = write(tmp_path / "ids.json", ["row-2", "row-0"])
    assert [row.id for row in keep_selected(rows, path)] == ["row-0", "row-2"]
    for entries, message in [
        (["row-9"], "1 ids are not in data.train, e.g. 'row-9'"),
        ({"row-0": 1}, "not readable as a JSON list of ids"),
        ([7], "not readable as a JSON list of ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            keep_selected(rows, write(path, entries))


class _Loader:
    def __init__(self, preferences: list[Preference]) -> None:
        self.preferences, self.seed = preferences, 0


def test_the_accuracy_of_an_edited_row_is_forgotten(rows: list[Preference], caplog: pytest.LogCaptureFixture) -> None:
    def contents(of: list[Preference]) -> dict[str, str]:
        keys = ContentKeys()
        return {row.id: keys.row(row) for row in of}

    learned = Curriculum(_Loader(rows), contents=contents(rows))  # type: ignore[arg-type]
    for index, row in enumerate(rows):
        learned.observe(row.id, index / 4)
    edited = [dataclasses.replace(rows[0], label=2), *rows[1:]]
    with caplog.at_level(logging.WARNING):
        again = Curriculum(_Loader(edited), learned.state(), contents=contents(edited))  # type: ignore[arg-type]
    assert sorted(again.state().values()) == [0.25, 0.5, 0.75]
    assert "accuracies of 1 rows" in caplog.text
    by_id = {row.id: 0.5 for row in rows}  # as earlier versions wrote them
    assert set(Curriculum(_Loader(rows), by_id, contents=contents(rows)).state()) == set(contents(rows).values())  # type: ignore[arg-type]
