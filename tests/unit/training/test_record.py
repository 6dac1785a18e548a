"""What a record keeps, and which runs may train from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rollouts import generated, prompt, rollout, step_rollouts

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training.record import Recorder, Replay, origin_of
from megatron_r1reward.training.step_sampler import StepRollouts

DATA = {"rows": 3, "ids": "abc", "seed": 0}
Make = Callable[..., RunConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Configurations; `changed`: keys by section."""
    for name, content in (("model", b"weights"), ("other", b"others!")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)

    def config(**changed: dict[str, Any]) -> RunConfig:
        tree: dict[str, dict[str, Any]] = {
            "run": {"output_dir": tmp_path / "run"},
            "model": {"path": tmp_path / "model"},
            "data": {"train": tmp_path / "train.jsonl"},
            "rl": {"steps": 3, "replay": tmp_path / "record"},
        }
        sections = tree | {name: tree.get(name, {}) | keys for name, keys in changed.items()}
        return RunConfig.model_validate(sections)

    return config


def batch(step: int, images: tuple[str, ...] = ()) -> StepRollouts:
    asked = replace(prompt(f"p{step}"), image_paths=images)
    found = step_rollouts(generated(step, [rollout(asked, [step, step + 1], sample=i) for i in range(2)]))
    return replace(found, generated=replace(found.generated, rollouts=(), seconds=2.5), seconds=1.5)


def record(config: RunConfig, steps: int = 3, *, resumed_step: int | None = None, **options: Any) -> None:
    assert config.rl.replay is not None
    recorder = Recorder(config.rl.replay, origin_of(config, DATA), resumed_step=resumed_step)
    for step in range(resumed_step or 0, steps):
        recorder.write(batch(step, **options))


def test_what_is_read_is_what_was_written(make: Make) -> None:
    record(make())
    replay = Replay(make())
    replay.check_steps(1, 3)
    for step in range(3):
        kept = replay.take(step)
        assert kept.scored == batch(step).scored
        assert kept.generated.accounting == batch(step).generated.accounting
        assert (kept.generated.seconds, kept.seconds) == (0.0, 0.0), "nothing was sampled now"


def test_a_resumed_run_drops_what_comes_after_its_checkpoint(make: Make) -> None:
    record(make(), 3)
    record(make(), 3, resumed_step=2)
    Replay(make()).check_steps(1, 3)
    record(make(), 2, resumed_step=2)
    with pytest.raises(ValueError, match=r"lacks 1 of the steps 1 to 3, the first is 3: set rl.steps to at most 2"):
        Replay(make()).check_steps(1, 3)
    record(make(), 1)  # from the start, e.g. queued again before there was a checkpoint
    assert len(list(make().rl.replay.glob("step-*"))) == 1  # type: ignore[union-attr]


def test_the_record_of_another_run_is_not_written_over(make: Make, tmp_path: Path) -> None:
    record(make())
    for changed, reason in (
        ({"run": {"output_dir": tmp_path / "elsewhere"}}, "run.output_dir: .*/run there, .*/elsewhere here"),
        ({"sampling": {"temperature": 0.5}}, "sampling.temperature: 1.0 there, 0.5 here"),
    ):
        with pytest.raises(ValueError, match=rf"holds the record of another run \({reason}\)"):
            record(make(**changed))
    assert len(list((tmp_path / "record").glob("step-*"))) == 3


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("rl", "rollout_batch_size", 128, "rl.rollout_batch_size: 256 there, 128 here"),
        ("algorithm", "samples_per_prompt", 2, "algorithm.samples_per_prompt: 1 there, 2 here"),
        ("data", "max_pixels", 50_176, "data.max_pixels: 501760 there, 50176 here"),
        ("sampling", "top_p", 0.9, "sampling.top_p: 1.0 there, 0.9 here"),
        ("reward", "format_weight", 1.0, "reward.format_weight: 0.5 there, 1.0 here"),
    ],
)
def test_a_configuration_that_would_have_sampled_otherwise_is_refused(
    make: Make, section: str, key: str, value: object, reason: str
) -> None:
    record(make())
    with pytest.raises(ValueError, match=f"is the record of another run .{reason}.: give this run"):
        Replay(make(**{section: {key: value, "replay": make().rl.replay} if section == "rl" else {key: value}}))


def test_methods_may_differ_and_that_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    record(make())
    with caplog.at_level("INFO"):
        Replay(make())
        assert not caplog.messages
        Replay(make(algorithm={"clip_high": 0.3}, data={"token_budget": 4096}))
    assert caplog.messages == [
        "the updates need not be those of the recorded run: data.token_budget: 8192 there, 4096 here; "
        "algorithm.clip_high: 0.2 there, 0.3 here"
    ]


def test_other_weights_are_refused_and_a_renamed_folder_is_not(make: Make, tmp_path: Path) -> None:
    record(make())
    with pytest.raises(ValueError, match=r"model.path and checkpoint.init_from: other weights"):
        Replay(make(model={"path": tmp_path / "other"}))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    Replay(make(model={"path": tmp_path / "copy"}))


def test_other_data_are_refused(make: Make) -> None:
    record(make())
    Replay(make()).check_data(DATA)
    with pytest.raises(ValueError, match=r"of other data or another order of them \(ids: abc there, abd here\)"):
        Replay(make()).check_data(DATA | {"ids": "abd"})


def test_a_folder_without_a_record_and_a_damaged_one(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record holds no record.json: it is no folder that rl.record was set to"):
        Replay(make())
    record(make())
    path = tmp_path / "record" / "step-00000002.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"\n".join(whole.splitlines()[:-1]) + b"\n")
    with pytest.raises(ValueError, match=r"step-00000002.jsonl holds 1 of 2 rollouts of step 2: copy it again"):
        Replay(make()).take(1)
    for damaged in (whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step-00000002.jsonl is not a recorded step"):
            Replay(make()).take(1)
    (tmp_path / "record" / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"record.json is not the head of a record"):
        Replay(make())


def test_images_are_found_where_they_are_now_and_only_the_same_ones(make: Make, tmp_path: Path) -> None:
    there = tmp_path / "images" / "digits" / "3.png"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"three")
    root = {"image_root": tmp_path / "images"}
    record(make(data=root), images=(str(there),))
    assert Replay(make(data=root)).take(0).scored[0].rollout.prompt.image_paths == (str(there),)
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"3.png does not exist: set data.image_root to a folder with the images"):
        Replay(make(data=root)).take(0)
    moved = make(data={"image_root": tmp_path / "moved"})
    here = tmp_path / "moved" / "digits" / "3.png"
    assert {item.rollout.prompt.image_paths for item in Replay(moved).take(0).scored} == {(str(here),)}
    here.write_bytes(b"four!")
    with pytest.raises(ValueError, match=r"3.png is another one than then"):
        Replay(moved).take(0)


def test_a_run_records_or_replays(tmp_path: Path, make: Make) -> None:
    with pytest.raises(ValueError, match=r"samples nothing that rl.record could keep: set one of them"):
        make(rl={"record": tmp_path / "a", "replay": tmp_path / "b"})
