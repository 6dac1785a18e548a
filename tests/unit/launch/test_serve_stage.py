"""`r1reward launch serve`, what slurm/serve.sh runs: supervisor and service as processes, before a scripted server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from waiting import wait_until

from megatron_r1reward.cluster.placement import Node, Site, place
from megatron_r1reward.config.load import load_config
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.run_dir import Address, RunDir

FIRST = "<think>The first.</think><answer>1</answer>"


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / FILE).write_text(PromptPolicy(template="{question} {answer1} {answer2} ?").to_json())
    path = tmp_path / "serve.toml"
    path.write_text(f"""
[run]
output_dir = "{tmp_path}/out"
[model]
path = "{model}"
[data]
train = "{tmp_path}/none.jsonl"
[rollout]
count = 3
[serve]
port = 0
""")
    return path


def test_the_servers_get_the_gpus_and_the_service_a_core(run_file: Path) -> None:
    nodes = tuple(Node(name=name, gpus=2, cpus=8) for name in ("a", "b"))
    placed = place(load_config(run_file), "serve", Site(groups=(nodes,)))
    assert [(one.component.name, one.component.nodes, one.component.gpus_per_node) for one in placed] == [
        ("rollout-0", ("a",), 1), ("rollout-1", ("a",), 1), ("rollout-2", ("b",), 1), ("serve", ("a",), 0),
    ]  # fmt: skip


def listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


@pytest.mark.slow
def test_a_life_of_the_service(run_file: Path, serve, tmp_path: Path) -> None:
    server, run = serve(FIRST), RunDir(root=tmp_path / "out")
    command = [sys.executable, "-m", "megatron_r1reward.cli", "launch", "--local", "serve", run_file]
    environment = {**os.environ, "R1REWARD_SERVE_TOKEN": "secret"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command), f'rollout.urls=["{server.url}"]'], env=environment, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: run.address("serve").exists() or process.poll() is not None)
        address = Address.read(run.address("serve"))
        assert address is not None, (tmp_path / "log").read_text()
        with httpx.Client(base_url=address.url, timeout=60, trust_env=False) as http:
            assert http.post("/v1/score", json={}).status_code == 401
            http.headers["Authorization"] = "Bearer secret"
            answer = http.post("/v1/compare", json={"question": "Which?", "responses": ["x", "y"]})
            assert answer.json()["orders_agree"] is False, answer.text
            one_order = {"question": "Which?", "responses": ["x", "y"], "both_orders": False}
            assert 'says orders "both"' in http.post("/v1/compare", json=one_order).json()["error"]
            # Told to end in the middle of a request, it takes no new one and finishes this one.
            server.chat.close()
            with ThreadPoolExecutor(1) as other:
                late = {"question": "Late?", "responses": ["x", "y"]}
                asked = other.submit(http.post, "/v1/compare", json=late)
                wait_until(lambda: server.chat.inside == 2)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: not listens(address.url))
                server.chat.open()
                assert asked.result().json()["orders_agree"] is False, asked.result().text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert not run.address("serve").exists(), "nobody shall take it for a service"
    texts = {request["messages"][0]["content"][-1]["text"] for request in server.requests if "messages" in request}
    assert texts == {"Which? x y ?", "Which? y x ?", "Late? x y ?", "Late? y x ?"}
    assert json.loads(run.exit_report.read_text())["outcome"] == "cancelled"
    assert "Traceback" not in run.log(0, "serve").read_text()


@pytest.mark.slow
def test_an_open_service_without_a_token_does_not_start(run_file: Path, serve, tmp_path: Path) -> None:
    server = serve(FIRST)
    command = [sys.executable, "-m", "megatron_r1reward.cli", "launch", "--local", "serve", run_file]
    command += ["serve.host=0.0.0.0", f'rollout.urls=["{server.url}"]']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "serve.host 0.0.0.0 is on the network, and R1REWARD_SERVE_TOKEN holds no token" in done.stderr + done.stdout
