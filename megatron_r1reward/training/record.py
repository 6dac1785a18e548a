"""A run's rollouts on disk: kept while it trains (`rl.record`), trained on again without servers (`rl.replay`).

    DIR/record.json           whose they are: data, model, configuration, where images were
    DIR/step-00000012.jsonl   line 1: the step, and a hash of every image; then one scored rollout per line, in the
                              order of the batch

Every file appears whole. Numbers are written so that they are read back bit for bit; a replay computes log-probs,
advantages and updates from them as the recorded run did.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_r1reward.checkpoint.manifest import hash_range
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.files import atomic_path, write_bytes
from megatron_r1reward.training.models_read import described_parts, first_weights
from megatron_r1reward.training.step_sampler import StepRollouts
from megatron_r1reward.types import ScoredRollout

log = logging.getLogger(__name__)
_FORMAT = 1
# What a recorded batch follows from: a run with other values would have had other rollouts, or other rewards for them.
_DECIDES = (
    ("rl", "rollout_batch_size"),
    ("rl", "pairing"),
    ("algorithm", "samples_per_prompt"),
    ("data", "min_pixels"),
    ("data", "max_pixels"),
    ("sampling", None),
    ("reward", None),
)
# What updates follow from besides: a replay may change it, and says so.
_SHAPES = ("model", "parallel", "moe", "precision", "data", "optimizer", "rl", "algorithm", "critic")
_FREE = {
    "model.path", "critic.path", "data.train", "data.image_root", "rl.record", "rl.replay", "rl.heldout_every",
    # Which rows a step trains on is compared by what it comes to, see `check_data`.
    "data.select", "data.categories", "data.difficulty", "data.accuracy", "data.curriculum", "data.attempts",
    "data.judgements",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Origin:
    """`record.json`: the run that made a record."""

    format: int
    run: str  # its run.output_dir
    data: dict[str, Any]  # of `resume.describe_data`
    model: str  # identity of the weights that it began with
    image_roots: tuple[str, ...]  # folders that its images were in
    config: dict[str, Any]
    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # the user's own files that rewards came from


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The first line of a step's file."""

    step: int  # counted from 1
    rollouts: int
    images: dict[str, str]  # path: xxh3-128 of the file
    batch: StepRollouts  # without its rollouts


_ORIGIN, _HEAD, _ROLLOUT = TypeAdapter(Origin), TypeAdapter(_Head), TypeAdapter(ScoredRollout)


def origin_of(config: RunConfig, data: Mapping[str, Any]) -> Origin:
    """How this run signs its record; `data` is its `TrainState.data`."""
    return Origin(
        format=_FORMAT,
        run=str(config.run.output_dir.resolve()),
        data=dict(data),
        model=first_weights(config),
        image_roots=tuple(map(str, _image_roots(config))),
        config=config.model_dump(mode="json"),
        parts=described_parts(config),
    )


def _image_roots(config: RunConfig) -> list[Path]:
    return [(config.data.image_root or config.data.train.parent).resolve(), (config.run.output_dir / "media").resolve()]


def _step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.jsonl"


class Recorder:
    """Writes a run's batches to `folder`, on the main rank.

    Args:
        resumed_step: finished steps of the run; what was recorded of later ones is dropped. None: the run begins.

    Raises:
        ValueError: the folder holds the record of another run.
    """

    def __init__(self, folder: Path, origin: Origin, *, resumed_step: int | None) -> None:
        self._folder = folder
        self._hashes: dict[str, str] = {}  # of images by path; they do not change during a run
        if (folder / "record.json").exists():
            earlier = _read_origin(folder)
            reasons = _contradictions(earlier, origin)
            if earlier.run != origin.run:
                reasons.insert(0, f"run.output_dir: {earlier.run} there, {origin.run} here")
            if reasons:
                raise ValueError(
                    f"rl.record {folder} holds the record of another run ({'; '.join(reasons)}): name another folder"
                )
        for path in folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > (resumed_step or 0):
                path.unlink()
        write_bytes(folder / "record.json", _ORIGIN.dump_json(origin, indent=1) + b"\n")

    def write(self, batch: StepRollouts) -> None:
        """Keep the batch that step `batch.generated.step` is about to be trained on."""
        step = batch.generated.step + 1
        paths = dict.fromkeys(path for item in batch.scored for path in item.rollout.prompt.image_paths)
        head = _Head(
            step=step,
            rollouts=len(batch.scored),
            images={path: self._hash(path) for path in paths},
            batch=replace(batch, scored=()),
        )
        with atomic_path(_step_file(self._folder, step)) as temporary, temporary.open("wb") as file:
            file.write(_HEAD.dump_json(head) + b"\n")
            file.writelines(_ROLLOUT.dump_json(item) + b"\n" for item in batch.scored)

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = _hash(Path(path))
        return self._hashes[path]


class Replay:
    """The batches of a record in place of a `RolloutProducer`: no servers, no judge.

    Args:
        config: of the run that trains on them; `rl.replay` is the record.

    Raises:
        ValueError: there is no record, or it is of another model or of a run whose configuration contradicts this one.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.rl.replay is not None
        self._folder = config.rl.replay
        self.origin = _read_origin(self._folder)
        mine = origin_of(config, self.origin.data)
        if reasons := _contradictions(self.origin, mine):
            raise ValueError(
                f"rl.replay {self._folder} is the record of another run ({'; '.join(reasons)}): give this run those "
                "values, or name its own record"
            )
        self._roots = list(zip(map(Path, self.origin.image_roots), map(Path, mine.image_roots), strict=True))
        if changed := _changes(self.origin.config, mine.config):
            log.info("the updates need not be those of the recorded run: %s", "; ".join(changed))

    def check_data(self, data: Mapping[str, Any]) -> None:
        """ValueError unless `data`, of `resume.describe_data`, are those of the record."""
        reasons = _different(self.origin.data, json.loads(json.dumps(data)))
        if reasons:
            raise ValueError(
                f"rl.replay {self._folder} is of other data or another order of them ({'; '.join(reasons)}): set "
                "data.train, data.select, data.curriculum, data.swap and run.seed to the recorded run's"
            )

    def check_steps(self, first: int, last: int) -> None:
        """ValueError unless steps `first` to `last`, counted from 1, are all there."""
        lacking = [step for step in range(first, last + 1) if not _step_file(self._folder, step).exists()]
        if lacking:
            raise ValueError(
                f"rl.replay {self._folder} lacks {len(lacking)} of the steps {first} to {last}, the first is "
                f"{lacking[0]}: set rl.steps to at most {lacking[0] - 1}, or go on with the recorded run"
            )

    def take(self, step: int) -> StepRollouts:
        """The recorded batch of step `step`, counted from 0.

        Raises:
            ValueError: its file is damaged, or an image is gone or another one.
        """
        path = _step_file(self._folder, step + 1)
        try:
            first, *rows = path.read_bytes().splitlines()
            head = _HEAD.validate_json(first)
            scored = tuple(map(_ROLLOUT.validate_json, rows))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a recorded step ({_short(error)}): copy it again") from error
        if (head.step, head.rollouts) != (step + 1, len(scored)):
            raise ValueError(
                f"{path} holds {len(scored)} of {head.rollouts} rollouts of step {head.step}: copy it again"
            )
        moved = {path: self._find(path, digest) for path, digest in head.images.items()}
        return replace(
            head.batch,
            generated=replace(head.batch.generated, seconds=0.0),
            scored=tuple(_with_images(item, moved) for item in scored),
            seconds=0.0,
        )

    def _find(self, path: str, digest: str) -> str:
        """Where an image is here: under the same path, or below this run's image folder."""
        old = Path(path)
        places = [here / old.relative_to(there) for there, here in self._roots if old.is_relative_to(there)]
        for place in (*places, old):
            if place.is_file() and _hash(place) == digest:
                return str(place)
        state = "is another one than then" if any(place.is_file() for place in (*places, old)) else "does not exist"
        raise ValueError(
            f"rl.replay {self._folder}: image {path} {state}: set data.image_root to a folder with the images of the "
            f"recorded run, whose own was {self.origin.image_roots[0]}"
        )

    def before_push(self) -> None:
        """Nothing is being sampled."""

    def state(self) -> dict[str, Any]:
        """As of a producer that has nothing ahead: the run may go on with servers."""
        return {"ready": None, "accuracies": "{}"}

    def close(self) -> None:
        """Nothing is held open."""


def _read_origin(folder: Path) -> Origin:
    path = folder / "record.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no record.json: it is no folder that rl.record was set to")
    try:
        origin = _ORIGIN.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is not the head of a record ({_short(error)}): copy it again") from error
    if origin.format != _FORMAT:
        raise ValueError(f"{path} has format {origin.format}, this version reads {_FORMAT}: use the one that wrote it")
    return origin


def _contradictions(there: Origin, here: Origin) -> list[str]:
    """In what two runs differ, of all that decides their rollouts but the data."""
    reasons = [] if there.model == here.model else ["model.path and checkpoint.init_from: other weights"]
    for section, key in _DECIDES:
        old, new = there.config[section], here.config[section]
        keys = old.keys() & (new.keys() if key is None else {key})  # earlier versions had fewer
        reasons += _different(old, new, names=sorted(keys), prefix=f"{section}.")
    reasons += [
        f"{kind} says something else than then"
        for kind in sorted(there.parts.keys() & here.parts.keys())
        if there.parts[kind]["sha256"] != here.parts[kind]["sha256"]
    ]
    return reasons


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what they differ of what updates follow from besides."""
    return [
        text
        for section in _SHAPES
        for name in here[section]
        if f"{section}.{name}" not in _FREE
        for text in _different(there.get(section, {}), here[section], names=[name], prefix=f"{section}.")
    ]


def _different(
    there: Mapping[str, Any], here: Mapping[str, Any], *, names: Sequence[str] | None = None, prefix: str = ""
) -> list[str]:
    names = sorted(there.keys() | here.keys()) if names is None else names
    return [
        f"{prefix}{name}: {there.get(name)} there, {here.get(name)} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _with_images(item: ScoredRollout, moved: Mapping[str, str]) -> ScoredRollout:
    prompt = item.rollout.prompt
    paths = tuple(moved[path] for path in prompt.image_paths)
    if paths == prompt.image_paths:
        return item
    return replace(item, rollout=replace(item.rollout, prompt=replace(prompt, image_paths=paths)))


def _hash(path: Path) -> str:
    return hash_range(path, 0, path.stat().st_size)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0]
