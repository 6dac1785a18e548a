"""The demo in small: every stage through the command line, with real servers; then a run that is killed and resumed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from starlette.requests import Request
from typer.testing import CliRunner
from waiting import wait_until

from megatron_r1reward.cli import app
from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.demo.pipeline import run_demo
from megatron_r1reward.launch import stages
from megatron_r1reward.launch.trainer_ranks import train
from megatron_r1reward.monitor.sinks import read_rows
from megatron_r1reward.run_dir import Address, ExitReport, RunDir
from megatron_r1reward.servers.keeper import descendants
from megatron_r1reward.servers.process import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]  # the first test runs the whole pipeline
RUN_S = 1800.0
RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
# Small enough for a test; the shape of the pipeline is the demo's.
SMALLER = {
    "sft.toml": {"run": {"local_ranks": 1}, "sft": {"steps": 60}},
    "judge.toml": {"run": {"local_ranks": 1}, "sft": {"steps": 10, "global_batch_size": 16}},
    "eval.toml": {
        "rollout": {"count": 1},
        "annotate": {"max_rows": 60},
        "evaluation": {"max_pairs": 12, "samples": 3, "voting": [1, 3], "extra_pairs": 4},
    },
    "rl.toml": {
        "run": {"local_ranks": 1},
        "rollout": {"count": 1},
        "rl": {"steps": 2, "rollout_batch_size": 16, "train_batch_size": 8, "heldout_every": 2, "heldout_pairs": 8},
        "sampling": {"temperature": 0.8},  # what is trained on is what was sampled, also at another temperature than 1
    },
}


def write_toml(path: Path, tree: dict[str, dict[str, object]]) -> None:
    lines = []
    for section, values in tree.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished small demo."""
    folder = tmp_path_factory.mktemp("pipeline")
    run_files = folder / "run-files"
    run_files.mkdir()
    for name, changes in SMALLER.items():
        tree = tomllib.loads((RECIPES / name).read_text())
        for section, values in changes.items():
            tree.setdefault(section, {}).update(values)
        write_toml(run_files / name, tree)
    out = folder / "demo"
    run_demo(out, run_files, sft_rows=2_000, pool_rows=200, judge_rows=200, best_of_images=4)
    return out


def rows(run: Path) -> dict[int, dict[str, float]]:
    path = run / "metrics.jsonl"
    return {row["step"]: row for row in (read_rows(path) if path.exists() else [])}


def test_report_holds_what_it_promises(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    for stage in ("sft", "rl"):
        assert {"accuracy", "interval", "voting", "any_correct", "format_rate"} <= report[stage].keys()
        assert {"consistency_rate", "mean_response_tokens"} <= report[stage].keys()
        assert set(report[stage]["voting"]) == {"1", "3"}
    assert 0 <= report["control"]["shuffled_images"]["accuracy"] <= 1
    assert report["heldout_pairs"] == 12
    kinds = [kind["kind"] for kind in report["rl"]["pair_kinds"]]
    assert {"right against wrong", "near-equal", "identical"} <= set(kinds)
    assert report["versions"].keys() >= {"torch", "megatron-core", "vllm", "transformers"}
    assert report["wall_seconds"] > 0
    best = report["best_of_n"]
    scores = [json.loads(line) for line in (finished / "use" / "scores.jsonl").read_text().splitlines()]
    assert (best["images"], best["candidates"], best["failed"]) == (len(scores), 8, 0) == (4, 8, 0)
    assert 0 < best["judgements"] == sum(row["calls"] for row in scores) <= 4 * 3 * 4 * 2  # rounds, pairs, orders
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_sampler_and_trainer_agree_from_the_first_step_to_the_last(finished: Path) -> None:
    """float32 on both sides: the gap is rounding, also after weights were pushed, at a temperature other than 1."""
    metrics = rows(finished / "rl")
    assert set(metrics) == {1, 2}
    for row in metrics.values():
        assert row["mismatch/max_abs"] < 1e-3


def test_the_judge_is_asked_only_about_right_answers(finished: Path) -> None:
    for row in rows(finished / "rl").values():
        right = round(row["reward/result"] * 16)
        assert row["judge/asked"] == right
        assert row["judge/consistent"] + row["judge/inconsistent"] + row["judge/unknown"] == right


def test_servers_that_hang_and_die_in_the_middle_of_a_run(finished: Path, tmp_path: Path) -> None:
    """The only rollout server hangs while the judge dies, then its whole step is killed: the run goes on with the
    current weights and ends with the number of steps that was asked for."""
    run = RunDir(root=tmp_path / "rl")
    overrides = {
        "run.output_dir": run.root,
        "model.path": finished / "sft" / "hf",
        "judge.model_path": finished / "judge" / "hf",
        "data.train": finished / "data" / "pool.jsonl",
        "data.select": finished / "annotate" / "hard.json",
        "evaluation.data": finished / "data" / "heldout.jsonl",
        "run.local_ranks": 1,
        "rl.steps": 5,
        "rl.rollout_batch_size": 16,
        "rl.train_batch_size": 8,
        "rl.heldout_every": 100,
        "rollout.count": 1,
        "rollout.health_interval_s": 0.5,
        "rollout.health_failures": 2,
        "rollout.health_timeout_s": 30.0,  # a busy machine is no hang
        "judge.health_interval_s": 0.5,
        "judge.health_timeout_s": 30.0,
    }
    command = [sys.executable, "-m", "megatron_r1reward.cli", "rl", str(RECIPES / "rl.toml")]
    process = subprocess.Popen([*command, *(f"{key}={value}" for key, value in overrides.items())])

    def step_of(name: str) -> int:
        return int(run.step_id(name).read_text().split()[1])

    def vllm_of(name: str) -> list[int]:
        """Its keeper first, then the API server."""
        found = sorted(descendants(step_of(name)))
        assert found, f"{name} has no processes"
        return found

    def wait_for(condition) -> None:
        wait_until(lambda: condition() or process.poll() is not None, RUN_S)
        assert process.poll() is None, "the run has ended before that"

    def start_of(name: str) -> int:
        address = Address.read(run.address(name))
        return -1 if address is None else address.start

    try:
        wait_for(lambda: max(rows(run.root), default=0) >= 1)
        os.kill(vllm_of("judge-0")[1], signal.SIGKILL)
        for pid in vllm_of("rollout-0"):
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: start_of("rollout-0") == 1)
        # At once, before steps go on: a run without its rollout server waits for the next start of the judge, too.
        family = vllm_of("rollout-0")
        os.kill(step_of("rollout-0"), signal.SIGKILL)
        assert process.wait(RUN_S) == 0
    finally:
        process.terminate()
        process.wait(120)
    metrics = rows(run.root)
    assert list(metrics) == [1, 2, 3, 4, 5]
    assert all(row["rollout/failed"] == 0 and row["mismatch/max_abs"] < 1e-3 for row in metrics.values())
    assert metrics[5]["servers/restarts"] == start_of("rollout-0") == 2
    assert start_of("judge-0") == 1
    assert ExitReport.read(run.exit_report).outcome == "done"
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()], "vLLM has outlived its step"


def test_the_annotators_reasonings_become_a_cold_start(finished: Path, tmp_path: Path) -> None:
    """annotate (a real server, in the pipeline) -> data sft -> sft, both in this process."""
    run_files, out = finished.parent / "run-files", tmp_path / "cold-start"
    annotated = [f"run.output_dir={finished / 'annotate'}", f"model.path={finished / 'sft' / 'hf'}"]
    annotated.append(f"data.train={finished / 'data' / 'pool.jsonl'}")
    told = CliRunner().invoke(app, ["data", "sft", str(run_files / "eval.toml"), "--out", str(out), *annotated])
    assert told.exit_code == 0, told.output
    summary = json.loads((out / "sft.json").read_text())
    attempts = [json.loads(line) for line in (finished / "annotate" / "attempts.jsonl").read_text().splitlines()]
    right = {row["preference_id"] for row in attempts if any(row["attempts"])}
    assert 0 < summary["counts"]["used"] <= len(right)
    assert summary["tokens"] > 0
    assert all(reply["text"] and reply["completion_tokens"] > 0 for row in attempts for reply in row["replies"])
    trained = [f"run.output_dir={tmp_path / 'sft'}", f"model.path={finished / 'model'}"]
    trained += [f"data.train={out / 'sft.jsonl'}", f"data.image_root={finished / 'data'}"]
    trained += ["sft.steps=2", "sft.global_batch_size=4"]
    assert train(load_config(run_files / "sft.toml", trained), "sft")
    assert sorted(rows(tmp_path / "sft")) == [1, 2]


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[VllmServer]:
    """One server for the runs below: it takes weights, and its chat route stands in for a judge."""
    section = ServerSection(dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_bytes=1 << 27)
    with VllmServer(
        section,
        model_path=finished / "sft" / "hf",
        log_path=finished / "shared-server.log",
        weight_transfer="gloo",
        media_root=finished,
        pixels=(3136, 501_760),
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runs below need to use a server that they did not start."""
    if "server" in request.fixturenames:
        running: VllmServer = request.getfixturevalue("server")
        monkeypatch.setenv("R1REWARD_SERVER_TOKEN", running.token)
        monkeypatch.setenv("OPENAI_API_KEY", running.token)


def rl_command(finished: Path, server: VllmServer, output: Path, *, rollout_url: str | None = None) -> list[str]:
    overrides = {
        "run.output_dir": output,
        "model.path": finished / "sft" / "hf",
        "data.train": finished / "data" / "pool.jsonl",
        "data.select": finished / "annotate" / "hard.json",
        "data.attempts": finished / "annotate" / "attempts.jsonl",
        "data.curriculum": "[{until_step = 3, difficulty = [2, 9]}, {}]",  # a resume is in the middle of a stage
        "rollout.urls": json.dumps([rollout_url or server.url]),
        "judge.urls": json.dumps([server.url]),
        "judge.retries": 0,
        "judge.max_steps_without_judge": 100,
        "run.local_ranks": 1,
        "rl.steps": 4,
        "rl.rollout_batch_size": 16,
        "rl.train_batch_size": 8,
        "checkpoint.save_every": 2,
    }
    command = [sys.executable, "-m", "megatron_r1reward.cli", "rl", str(RECIPES / "rl.toml")]
    return (
        command
        + [f"{key}={value}" for key, value in overrides.items()]
        + ["evaluation.data=" + str(finished / "data" / "heldout.jsonl")]
    )


def test_an_evaluation_asks_a_judge_which_votes_count(finished: Path, server: VllmServer, tmp_path: Path) -> None:
    """The model judges itself; its replies are constrained, so every sample with a verdict gets an answer, once."""
    overrides = {
        "run.output_dir": tmp_path / "eval",
        "model.path": finished / "sft" / "hf",
        "data.train": finished / "data" / "pool.jsonl",
        "evaluation.data": finished / "data" / "heldout.jsonl",
        "evaluation.max_pairs": 4,
        "evaluation.samples": 3,
        "evaluation.voting": "[1, 3]",
        "evaluation.extra_pairs": 0,
        "evaluation.judge_filtered_votes": "true",
        "rollout.urls": json.dumps([server.url]),
        "judge.urls": json.dumps([server.url]),
    }
    stages.evaluate(load_config(RECIPES / "eval.toml", [f"{key}={value}" for key, value in overrides.items()]))
    budget = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["vote_budget"]
    judged = budget["judged"]
    if judged is None:  # sixty steps do not promise a model that gives verdicts
        assert budget["not_judged"] == "no sample has a verdict"
        return
    assert budget["not_judged"] is None
    assert 0 < judged["consistent"] + judged["inconsistent"] <= 4 * 2 * 3
    assert judged["unknown"] == 0
    assert "both orders, judge-filtered" in {point["method"] for point in budget["points"]}
    assert (tmp_path / "eval" / "judge-verdicts.sqlite").exists()


def test_a_killed_run_continues_as_if_nothing_had_happened(finished: Path, server: VllmServer, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints; the losses after the resume are those of the run that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(rl_command(finished, server, whole), check=True, timeout=RUN_S)

    async def hold_after_step_3(request: Request) -> None:
        """Nothing is sampled any more: the run cannot end before it is killed."""
        while "generate" in request.url.path and max(rows(killed), default=0) >= 3:
            await asyncio.sleep(0.05)

    proxy = FaultProxy(lambda: server.url)
    proxy.fault = hold_after_step_3
    process = subprocess.Popen(rl_command(finished, server, killed, rollout_url=proxy.url), start_new_session=True)
    try:
        wait_until(lambda: max(rows(killed), default=0) >= 3 or process.poll() is not None, RUN_S)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        proxy.close()
    assert not (killed / "DONE").exists()

    subprocess.run(rl_command(finished, server, killed), check=True, timeout=RUN_S)
    expected, got = rows(whole), rows(killed)
    assert set(got) == set(expected) == {1, 2, 3, 4}
    assert any(row["grad_norm"] > 1e-3 for row in expected.values()), "without a gradient the comparison is empty"
    for step, row in expected.items():
        for name in ("loss", "grad_norm", "reward/mean", "response/mean_tokens", "entropy", "lr"):
            assert got[step][name] == pytest.approx(row[name], rel=2e-3, abs=2e-5), (step, name)
    assert {row["judge/unknown"] for row in expected.values()} == {0}, "a server of ours makes any model choose"


def test_weights_that_were_trained_are_the_weights_that_are_exported(finished: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(finished / "sft" / "hf" / "model.safetensors")
    after = load_file(finished / "rl" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    config = (finished / "sft" / "hf" / "config.json").read_text()
    assert (finished / "rl" / "hf" / "config.json").read_text() == config
