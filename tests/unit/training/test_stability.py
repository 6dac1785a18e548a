"""`benchmarks/stability.py`: a cell trains and is judged, once; the summary is right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import stability
import stability_summary as summary
from stability import Bench, Cell

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.demo.digits import build_digits
from megatron_r1reward.demo.pipeline import write_demo_model
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology

SMALL = ("rl.rollout_batch_size=4", "rl.train_batch_size=2", "sampling.max_tokens=6", "data.max_pixels=3136",
         "algorithm.entropy_coefficient=0.01")  # fmt: skip  # something to learn without rewards


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A demo whose models have learned nothing."""
    demo = tmp_path_factory.mktemp("demo")
    build_digits(demo / "data", seed=0, sft_rows=24, pool_rows=24, heldout_pairs=6, judge_rows=24)
    write_demo_model(demo / "model", [demo / "data" / "sft.jsonl", demo / "data" / "judge_sft.jsonl"], seed=0)
    for stage in ("sft", "rl", "judge"):
        (demo / stage).mkdir()
        (demo / stage / "hf").symlink_to(demo / "model")
    return Bench(demo=demo, work=demo / "work", steps=2, pairs=1, rows=16, extra=SMALL)


@pytest.mark.slow
def test_a_cell_trains_is_judged_and_is_not_run_twice(
    bench: Bench, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [
        Cell(stress="stale", method="stable_reinforce", seed=0),
        Cell(stress="none", method="reinforce_plus_plus", seed=0),
    ]
    stale, fresh = results = stability.run_matrix(bench, cells, topology)
    for cell in results:
        assert (cell["steps"], cell["ended"], cell["not_finite"]) == (2, "", 0)
        assert min(cell["curves"]["grad_norm"]) > 0
        assert 0.0 <= cell["end"]["greedy"] <= 1.0 and cell["end"]["tokens"] <= 6
    assert stale["staleness"] == pytest.approx(0.5), "both steps' samples are of the first weights"
    assert fresh["staleness"] == 0 and fresh["mismatch_max"] < 1e-4, "the sampler's log-probs are the trainer's"
    with pytest.raises(ValueError, match="is right 8 times about no row"):
        stability.run_matrix(bench, [Cell(stress="late", method="grpo", seed=0)], topology)

    def never(*_: object) -> dict[str, Any]:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(stability, "run_cell", never)
    assert stability.run_matrix(bench, cells, topology) == json.loads(json.dumps(results))
    other = Bench(**{**vars(bench), "extra": (*SMALL, "optimizer.lr=1e-3")})
    with pytest.raises(AssertionError, match="run again"):
        stability.run_matrix(other, cells, topology)


def test_which_reasonings_support_their_verdict() -> None:
    def said(seen: str, named: str, response: str, answer: str) -> bool:
        text = (
            f"<think>The answer 7 is in Response 1, the answer 3 is in Response 2.\nI see {seen}.\n"
            f"The answer {named} is in Response {response}.</think><answer>{answer}</answer>"
        )
        found = stability._FORM.fullmatch(text)
        assert found is not None
        return stability.supported(*found.groups())

    assert said("7", "7", "1", "1") and said("3", "3", "2", "2")
    assert not said("7", "7", "1", "2"), "another verdict"
    assert not said("7", "7", "2", "2"), "another response says so"
    assert not said("7", "3", "2", "2"), "another digit was seen"
    assert not said("5", "5", "1", "1"), "nobody says so"


def test_the_matrix_is_balanced_over_methods_when_it_is_interrupted() -> None:
    cells = stability.matrix(["late", "rate"], ["grpo", "sapo"], [0, 1])
    assert [(cell.stress, cell.seed, cell.method) for cell in cells[:3]] == [
        ("late", 0, "grpo"), ("late", 0, "sapo"), ("late", 1, "grpo")
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == len(cells) == 8
    everything = stability.matrix(list(stability.STRESSES), [], [0, 1, 2])
    assert {cell.method for cell in everything} <= set(stability.METHODS)


STEP: dict[str, float | None] = {
    "reward/result": 0.98, "advantage/std": 0.2, "advantage/filtered_negative": 0.02,
    "advantage/filtered_positive": 0.0, "advantage/filtered_fraction": 0.02, "advantage/negative_kept": 0.0,
    "advantage/positive_kept": 0.98,
    "advantage/balance": 1.0, "grad_norm": 0.5, "loss": 0.1, "rollout/unparsable_fraction": 0.0,
    "rollout/answer_1_fraction": 0.5, "response/truncated_fraction": 0.0, "entropy": 0.1, "update/skipped": 0.0,
    "ratio/preclipped_fraction": 0.0, "ratio/clipped_fraction": 0.25, "ratio/max_abs_log": 2.0, "staleness/mean": 0.0,
    "mismatch/max_abs": 1e-6,
}  # fmt: skip


def test_the_summary_of_known_steps() -> None:
    config = RunConfig.model_validate({"run": {"output_dir": "x"}, "model": {"path": "x"}, "data": {"train": "x"}})
    fine = STEP | {"advantage/filtered_negative": 0.0, "advantage/filtered_fraction": 0.0,
                   "advantage/negative_kept": 0.02, "advantage/balance": 0.0, "grad_norm": 1.5}  # fmt: skip
    broken = fine | {"loss": None, "update/skipped": 1.0}
    found = summary.summarise([STEP, fine, broken], config)
    assert found["alarms"] == {"one_sided": 1} and found["negative_evidence_removed"] == 1
    assert found["grad_norm_max"] == 1.5 and found["grad_norm_last"] == pytest.approx(3.5 / 3)
    assert found["filtered"] == pytest.approx(0.02 / 3) and found["clipped"] == 0.25
    assert (found["not_finite"], found["skipped_updates"]) == (1, 1)


def cell(seed: int, greedy: float, **changed: object) -> dict[str, Any]:
    names = ("sampled", "orders_agree", "contradicts", "judged_inconsistent", "tokens", "no_answer")
    base = {"stress": "late", "method": "grpo", "seed": seed, "ended": "", "start": {"greedy": 0.9}}
    config = RunConfig.model_validate({"run": {"output_dir": "x"}, "model": {"path": "x"}, "data": {"train": "x"}})
    return base | summary.summarise([STEP], config) | {"end": dict.fromkeys(names, 0.1) | {"greedy": greedy}} | changed


def test_means_intervals_and_collapses_over_seeds() -> None:
    cells = [cell(0, 0.8), cell(1, 0.9), cell(2, 1.0)]
    (row,) = summary.table(cells)
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom
    assert row["greedy"] == pytest.approx(0.9)
    assert row["greedy_interval"] == pytest.approx([0.9 - half, 0.9 + half], abs=1e-6)
    assert row["collapses"] == 0
    assert summary.mean_interval([math.nan, 1.0])[0] == 1.0 and math.isnan(summary.mean_interval([math.nan])[0])
    assert summary.is_collapse(cell(0, 0.55)), "a coin could have done it"
    assert row["alarms"] == {"one_sided": 3}
    assert summary.is_collapse(cell(0, 0.9, ended="no update was finite"))
    assert summary.is_collapse(cell(0, 0.9, end=None))
    (alone,) = summary.table(cells[:1])
    assert math.isnan(alone["greedy_interval"][0]), "one seed says nothing about others"
    assert summary.for_json(alone)["greedy_interval"] == [None, None]
