"""A run that a real server sampled for, trained again from its record: the same updates, to the last bit.

It has what makes a batch hard to repeat: one step off policy, both orders of a pair in one group, pairs without a
label, a parser and a term of the reward that come from files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import STEPS, config, rows, run
from safetensors.torch import load_file

from megatron_r1reward.config.load import dump_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.training import rl

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("original_weights_afterwards")]
UPDATE = ("loss", "grad_norm", "lr", "entropy", "ratio/mean", "advantage/std", "mismatch/mean_abs", "correction/weight")
ROLLOUTS = (
    "reward/mean", "response/mean_tokens", "staleness/mean", "rollout/failed", "rollout/unlabelled_fraction",
    "terms/agreement", "terms/agreement_std", "terms/mine",
)  # fmt: skip
PARTS = """
def read(text):  # a random model gives no verdict: its noise does
    return 1 + len(text) % 2

def mine(rows):
    assert all(row.question and row.label in (None, 1, 2) for row in rows)
    return [row.agreement - 0.5 * (row.answer == row.label) for row in rows]
"""


@pytest.fixture(scope="module")
def recorded(
    shared_pool: RolloutPool,
    tiny_folder: Path,
    data: Path,
    topology: Topology,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunConfig:
    """A finished run one step off policy, so that its samples are of several weight versions."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "parts.py").write_text(PARTS)
    rows = [json.loads(line) for line in (data / "pool.jsonl").read_text().splitlines()]
    rows = [row | ({"answer": "tie"} if place % 2 else {}) for place, row in enumerate(rows)]
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    terms = [{"name": "result"}, {"name": "agreement", "weight": 0.5}]
    own = {"name": "mine", "function": f"{folder}/parts.py:mine"}
    settings = config(
        folder / "run", tiny_folder, data, "one_step_off",
        data={"train": folder / "pool.jsonl", "image_root": data},
        rl={"record": folder / "record", "pairing": "both_orders"},
        prompt={"parser": f"{folder}/parts.py:read"},
        # A random model never ends by itself: what the limit cut off is read like the rest.
        reward={"use_judge": False, "truncated": "as_is", "terms": [*terms, own]},
    )  # fmt: skip
    run(settings, topology, shared_pool)
    return settings


def replay_of(recorded: RunConfig, output: Path, **changed: dict[str, Any]) -> RunConfig:
    """Without data, too."""
    tree = recorded.model_dump()
    tree["rl"] |= {"record": None, "replay": recorded.rl.record}
    tree["run"]["output_dir"], tree["data"]["train"] = output, output / "gone.jsonl"
    return RunConfig.model_validate(tree | {name: tree[name] | keys for name, keys in changed.items()})


def weights(config: RunConfig) -> Mapping[str, torch.Tensor]:
    return load_file(config.run.output_dir / "hf" / "model.safetensors")


def test_a_replay_repeats_the_recorded_run_bit_for_bit(recorded: RunConfig, topology: Topology, tmp_path: Path) -> None:
    again = replay_of(recorded, tmp_path)
    rl.run(again, topology, None)
    expected, got = rows(recorded), rows(again)
    assert set(got) == set(expected) == set(range(1, STEPS + 1))
    assert expected[2]["staleness/mean"] == 1
    assert any(0 < row["rollout/unlabelled_fraction"] < 1 for row in expected.values())
    assert any(row["terms/agreement_std"] > 0 for row in expected.values())
    for step, row in expected.items():
        assert {name: got[step][name] for name in UPDATE + ROLLOUTS} == {name: row[name] for name in UPDATE + ROLLOUTS}
        assert not {"servers/ready", "heldout/accuracy"} & got[step].keys(), "there are no servers"
    before, after = weights(recorded), weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    original = load_file(recorded.model.path / "model.safetensors")
    assert any(not torch.equal(original[name], after[name]) for name in original), "something was learned"


def test_under_the_supervisor_no_server_is_started(recorded: RunConfig, tmp_path: Path) -> None:
    """`r1reward launch` starts the trainer alone; its updates are the recorded ones."""
    output, run_file = tmp_path / "run", tmp_path / "rl.toml"
    changed = {"num_threads": 1, "output_dir": output}
    dump_config(replay_of(recorded, output, run=changed), run_file)
    command = [sys.executable, "-m", "megatron_r1reward.cli", "launch", "rl", str(run_file), "--local"]
    subprocess.run(command, check=True, timeout=1200)
    assert json.loads((output / "exit.json").read_text())["outcome"] == "done"
    assert [path.name for path in sorted((output / "logs-0").glob("*.log"))] == ["supervisor.log", "trainer.log"]
    before, after = weights(recorded), load_file(output / "hf" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


class KilledError(RuntimeError):
    pass


def killed() -> float:
    raise KilledError


def test_a_run_that_was_killed_leaves_one_record(
    recorded: RunConfig, shared_pool: RolloutPool, topology: Topology, tmp_path: Path
) -> None:
    """Killed after step 3 with a checkpoint of step 2: the same files as of the run that was left alone."""
    tree = recorded.model_dump()
    tree["run"]["output_dir"], tree["rl"]["record"] = tmp_path / "run", tmp_path / "record"
    settings = RunConfig.model_validate(tree)
    with pytest.raises(KilledError):
        run(settings, topology, shared_pool, probe=killed)
    run(settings, topology, shared_pool)
    whole, resumed = recorded.rl.record, settings.rl.record
    assert whole is not None and resumed is not None
    for step in range(1, STEPS + 1):
        tokens = [
            [_told(json.loads(line)) for line in path.read_text().splitlines()[1:]]
            for path in (whole / f"step-{step:08d}.jsonl", resumed / f"step-{step:08d}.jsonl")
        ]
        assert tokens[0] == tokens[1] != []


def _told(item: dict[str, Any]) -> list[Any]:
    prompt = item["rollout"]["prompt"]
    return [
        prompt["group"],
        prompt["swapped"],
        prompt["label"],
        item["rollout"]["token_ids"],
        item["terms"],
        item["reward"],
    ]
