"""What a run may go on from: the same rows, the same order, a checkpoint that is of this run and whole."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1reward.checkpoint.dist import LATEST, RUN_ID, find_checkpoint, keep_identity
from megatron_r1reward.checkpoint.manifest import write_manifest
from megatron_r1reward.config.schema import CheckpointSection
from megatron_r1reward.training import resume

ROWS = {"a": "content of a", "b": "content of b"}


def state_with(rows: dict[str, str], *, same_data: bool = True, producer: Any = None) -> Any:
    config = SimpleNamespace(checkpoint=CheckpointSection(same_data=same_data))
    data = resume.describe_data(rows, seed=0, batch_size=4)
    return SimpleNamespace(config=config, data=data, step=3, producer=producer)


def check(state: Any, saved: dict[str, Any]) -> None:
    resume._check_data(state, saved, Path("step-00000003"))


def saved(rows: dict[str, str], **changed: Any) -> dict[str, Any]:
    return resume.describe_data(rows, seed=0, batch_size=4) | changed


def test_the_same_rows_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    check(state_with(ROWS), saved(ROWS))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (saved({"a": "content of a", "b": "edited"}), r"\(what the rows say \(texts, labels, images\) changed\)"),
        (saved({"b": "content of b", "a": "content of a"}), "the ids of the rows changed"),
        (saved(ROWS, seed=1), "seed: 1 then, 0 now"),
        (saved(ROWS, stages=[[2, 1, "a"], [None, 2, "b"]]), "data.curriculum, or the rows of its stages, changed"),
    ],
)
def test_other_rows_under_the_same_ids_are_other_data(then: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(state_with(ROWS), then)


def test_going_on_with_new_rows_says_so_and_drops_what_was_sampled_from_the_old_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = state_with(ROWS, same_data=False, producer={"ready": "a batch", "accuracies": "{}"})
    with caplog.at_level(logging.WARNING):
        check(state, saved({"a": "edited", "b": "content of b"}))
    assert "going on with the new ones from step 3" in caplog.text
    assert state.producer == {"ready": None, "accuracies": "{}"}


def test_a_checkpoint_of_the_last_version_resumes_and_the_unknown_is_said(caplog: pytest.LogCaptureFixture) -> None:
    old = {key: value for key, value in saved(ROWS).items() if key not in ("content", "stages")}
    with caplog.at_level(logging.WARNING):
        check(state_with(ROWS), old)
    assert "does not say what it was trained with: what the rows say (texts, labels, images)" in caplog.text
    with pytest.raises(ValueError, match="the ids of the rows changed"):
        check(state_with({"a": "", "c": ""}), old)


def checkpoint(root: Path, step: int, *, run: str = "run-a") -> Path:
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(f'{{"step": {step}}}')
    write_manifest(folder, {}, kind="training", run=run, step=step)
    return folder


def damage(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 9}')


def test_checkpoints_of_which_none_is_usable_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_checkpoint(tmp_path) is None, "nothing was ever saved"
    (tmp_path / "step-00000001.partial").mkdir()
    assert find_checkpoint(tmp_path) is None, "killed in the first save: there is nothing to lose"
    older, newer = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(newer)
    assert find_checkpoint(tmp_path) == older
    damage(older)
    with pytest.raises(ValueError, match=r"none of its 2 checkpoints can be used.*another run.output_dir"):
        find_checkpoint(tmp_path)
    assert "state.json does not match its hash" in caplog.text


def test_a_vanished_checkpoint_is_not_taken_for_a_new_run(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_text("step-00000002")
    with pytest.raises(ValueError, match="names step-00000002, but there is no checkpoint any more"):
        find_checkpoint(tmp_path)


def test_copied_step_folders_keep_their_identity(tmp_path: Path) -> None:
    """Without the file that names the run: the next start must know both the copied and the new ones."""
    copied = checkpoint(tmp_path, 4)
    assert find_checkpoint(tmp_path) == copied
    keep_identity(tmp_path, copied)
    assert (tmp_path / RUN_ID).read_text() == "run-a\n"
    damage(checkpoint(tmp_path, 5))
    assert find_checkpoint(tmp_path) == copied
    keep_identity(tmp_path, checkpoint(tmp_path, 6, run="run-b"))
    assert (tmp_path / RUN_ID).read_text() == "run-a\n", "a run keeps its name"
    assert find_checkpoint(tmp_path) == copied, "another run's step folder is not ours"


def test_step_folders_of_several_runs_need_the_users_decision(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, run="run-b")
    with pytest.raises(ValueError, match=r"checkpoints of 2 runs \(e.g. step-00000001, step-00000002\)"):
        find_checkpoint(tmp_path)
