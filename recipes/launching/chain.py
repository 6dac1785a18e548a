"""Tasks and what they wait for. Plain data: nothing here needs NeMo-Run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.config.load import load_config

REPOSITORY = Path(__file__).resolve().parents[2]

# Stages of the pipeline in order: the `r1reward launch` stage that each of them is, and what it waits for.
PIPELINE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "judge": ("sft", ()),  # the judge is trained like the reward model, beside it
    "select": ("annotate", ("sft",)),
    "rl": ("rl", ("sft", "judge", "select")),
    "eval": ("eval", ("sft", "rl")),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of an experiment: a command, run in `folder`.

    `run_dir` is where an `r1reward launch` writes its files; None for other programs.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    after: tuple[str, ...] = ()
    run_dir: Path | None = None

    def script(self, *, done: Path | None = None, wanted: Sequence[tuple[str, Path]] = ()) -> str:
        """The shell script of this task.

        Args:
            done: file to make at the end of a success.
            wanted: (task, file) pairs: the task whose file is missing has failed, and this one is not started.
        """
        lines = ["set -euo pipefail", f"cd {shlex.quote(str(self.folder))}"]
        for name, file in wanted:
            text = f"{self.name} is not started: {name} failed"
            lines.append(f"if [[ ! -e {shlex.quote(str(file))} ]]; then echo {shlex.quote(text)} >&2; exit 1; fi")
        # The checkout that submits is the one that runs.
        lines.append(f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}")
        lines.append("export PYTHONUNBUFFERED=1")
        if done is None:
            lines.append(f"exec {shlex.join(self.command)}")  # signals of Slurm reach the supervisor itself
        else:
            lines += [shlex.join(self.command), f"touch {shlex.quote(str(done))}"]
        return "\n".join(lines) + "\n"


def interpreter(python: Path | None) -> str:
    """The Python of the tasks: `python`, else the checkout's `.venv`, which must see what the nodes see.

    Raises:
        ValueError: there is none.
    """
    chosen = python or REPOSITORY / ".venv" / "bin" / "python"
    if not chosen.exists():
        fix = "give another --python" if python else "run make setup, or name the training environment with --python"
        raise ValueError(f"{chosen} does not exist: {fix}")
    return str(chosen.absolute())  # not resolved: a virtual environment's python is a link


def stage_task(
    name: str,
    stage: str,
    run_file: Path,
    overrides: Sequence[str],
    *,
    python: str,
    local: bool,
    after: tuple[str, ...] = (),
) -> Task:
    """`r1reward launch` of one stage; the run file is checked now.

    Raises:
        ValueError: the run file or an override cannot be used.
    """
    config = load_config(run_file, overrides)
    command = [python, "-m", "megatron_r1reward.cli", "launch", *(["--local"] if local else [])]
    command += [stage, str(run_file.absolute()), *overrides]
    folder = Path.cwd()
    return Task(name=name, command=tuple(command), folder=folder, after=after, run_dir=(folder / config.run.output_dir))


def convert_task(arguments: Sequence[str], *, python: str) -> Task:
    """A call of tools/convert_checkpoint.py.

    Raises:
        ValueError: there is no such program.
    """
    program = REPOSITORY / "tools" / "convert_checkpoint.py"
    if not program.is_file():
        raise ValueError(f"{program} does not exist: this recipe runs from a checkout of the repository")
    return Task(name="convert", command=(python, str(program), *arguments), folder=Path.cwd())


def pipeline_tasks(
    run_files: Mapping[str, Path],
    overrides: Sequence[str],
    *,
    output_dir: Path | None,
    python: str,
    local: bool,
) -> list[Task]:
    """The stages that have a run file, each with the results of those before it.

    Args:
        run_files: by stage of `PIPELINE`.
        overrides: `section.key=value` for every stage, `<stage>:section.key=value` for one. They win over the wiring.
        output_dir: each stage writes to `output_dir/<stage>`; None: where its run file says.

    Raises:
        ValueError: no stage, an unknown stage, or a run file that cannot be used.
    """
    if not run_files:
        raise ValueError(f"no stage: give a run file for at least one of {', '.join(PIPELINE)}")
    own = {stage: _overrides_of(stage, overrides, run_files) for stage in run_files}
    places = {}
    for stage, run_file in run_files.items():
        placed = [f"run.output_dir={output_dir / stage}"] if output_dir is not None else []
        places[stage] = load_config(run_file, [*placed, *own[stage]]).run.output_dir
    tasks = []
    for stage, (command, parents) in PIPELINE.items():
        if stage not in run_files:
            continue
        wiring = [f"run.output_dir={places[stage]}", *_wiring(stage, places)]
        after = tuple(parent for parent in parents if parent in run_files)
        tasks.append(
            stage_task(
                stage, command, run_files[stage], [*wiring, *own[stage]], python=python, local=local, after=after
            )
        )
    return tasks


def _overrides_of(stage: str, overrides: Sequence[str], run_files: Mapping[str, Path]) -> list[str]:
    mine = []
    for override in overrides:
        prefix, colon, rest = override.partition(":")
        if not colon or "=" in prefix or "." in prefix:  # the colon belongs to the value
            mine.append(override)
        elif prefix not in run_files:
            raise ValueError(f"override {override!r} is for stage {prefix!r}; this pipeline has {', '.join(run_files)}")
        elif prefix == stage:
            mine.append(rest)
    return mine


def _wiring(stage: str, places: Mapping[str, Path]) -> list[str]:
    """What a stage takes from the stages before it."""
    sources = {"select": ("sft",), "rl": ("sft",), "eval": ("rl", "sft")}.get(stage, ())
    model = next((source for source in sources if source in places), None)
    wiring = [f"model.path={places[model] / 'hf'}"] if model is not None else []
    if stage == "rl" and "select" in places:
        wiring.append(f"data.select={places['select'] / 'hard.json'}")
    if stage == "rl" and "judge" in places:
        wiring.append(f"judge.model_path={places['judge'] / 'hf'}")
    return wiring


def fail(message: str) -> int:
    """Say what the user can mend; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2
