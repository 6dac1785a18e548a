"""The reward model in use against a real vLLM server: chat route, images, log-probs, the service and its page's API."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from reference import PATIENCE_S, SERVER, requests_running, with_scalar_head
from running_service import Running
from typer.testing import CliRunner
from waiting import wait_until

from megatron_r1reward import RewardModel, Votes
from megatron_r1reward.cli import app
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.prompt import IMAGE_TOKEN, POINTWISE_TEMPLATE, PromptBuilder
from megatron_r1reward.judging.ask import AskOptions, Item, ModelRefusedError
from megatron_r1reward.judging.judge_prompt import JudgePrompt
from megatron_r1reward.judging.served import ServedModel
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.rollout.pool import SERVED_NAME, RolloutPool
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.serving.service import Backend
from megatron_r1reward.training import rm
from megatron_r1reward.training.state import build_state
from megatron_r1reward.types import Preference

pytestmark = pytest.mark.e2e
# The tiny model's weights are random: its answers have the form that a trained model gives them by itself.
FORM = {"structured_outputs": {"regex": "<think>[a-z]{1,8}</think><answer>[12]</answer>"}}
ASK = AskOptions(max_tokens=48, request_extra={"extra_body": FORM}, backoff_s=0.01)


@pytest.fixture(scope="module")
def model(shared_pool: RolloutPool) -> Iterator[RewardModel]:
    ((url, token),) = shared_pool.group.endpoints()
    with RewardModel.connect(url, model=SERVED_NAME, api_key=token, options=ASK) as connected:
        yield connected


def test_a_comparison_has_verdicts_and_probabilities(model: RewardModel, image_paths: tuple[str, ...]) -> None:
    compared = model.compare("Which?", ("It is 1.", "It is 2."), image_paths[:2], votes=4, seed=1)
    assert compared.counts.voters == 8
    assert compared.counts.unparsable == 0
    for judgement in compared.judgements:
        assert judgement.p_first is not None
        assert 0 < judgement.p_first < 1
        assert 0 < judgement.tokens <= 48
        assert judgement.finish_reason == "stop"
    again = model.compare("Which?", ("It is 1.", "It is 2."), image_paths[:2], votes=4, seed=1)
    assert [item.text for item in again.judgements] == [item.text for item in compared.judgements]


def test_the_answer_depends_on_the_picture(model: RewardModel, image_paths: tuple[str, ...]) -> None:
    seen = {model.compare("Which?", ("a", "b"), [path]).probability for path in image_paths}
    assert len(seen) == len(image_paths)


def test_a_ranking_asks_what_its_schedule_says(model: RewardModel) -> None:
    ranking = model.rank("Which?", ["a", "b", "c", "d"], votes=Votes(samples=2))
    assert ranking.calls == 2 * 2 * 4  # two rounds of two pairs, two orders, two samples
    assert sum(ranking.rewards) == pytest.approx(2.0)


def test_what_does_not_fit_is_refused_with_the_servers_words(model: RewardModel) -> None:
    with pytest.raises(ModelRefusedError, match="answered 400"):
        model.compare("word " * 30_000, ("a", "b"))


def test_files_are_scored(model: RewardModel, shared_pool: RolloutPool, tmp_path: Path, image_paths) -> None:
    from megatron_r1reward.judging.score_files import ScoreOptions, score_file

    rows = tmp_path / "in.jsonl"
    rows.write_text(f'{{"question": "q", "responses": ["a", "b", "c"], "images": ["{image_paths[0]}"]}}\n')
    summary = score_file(model, rows, tmp_path / "out.jsonl", ScoreOptions(votes=Votes()), model_name="tiny")
    assert (summary.rows, summary.failed, summary.unparsable) == (1, 0, 0)


def test_a_benchmark_is_judged_once(
    shared_pool: RolloutPool, tmp_path: Path, image_paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, in both orders, by the command, and the same server as the judge of the samples; a second run
    finds all of it on record. One pair is about text alone, and the responses of one show pictures."""
    ((url, token),) = shared_pool.group.endpoints()
    monkeypatch.setenv("BENCH_KEY", token or "")
    rows = [
        {"id": name, "prompt": "Which?", "chosen": f"It is {name}.", "rejected": "b", "category": "c", "image": path}
        for name, path in zip("xyz", image_paths, strict=False)
    ]
    drawn = {"chosen": "So:<image>", "chosen_images": list(image_paths[:1]), "rejected_image": image_paths[1]}
    rows += [{**rows[2], **drawn, "id": "drawn", "rejected": ""}, {**rows[0], "id": "text", "image": None}]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["bench", "pairs", str(source), "--out", str(out), "--model", url, "--model-name", SERVED_NAME]
    command += ["--image-root", "/", "--samples", "3", "--max-tokens", "48", "--api-key-variable", "BENCH_KEY"]
    command += ["--judge", url, "--judge-name", SERVED_NAME, "--judge-key-variable", "BENCH_KEY"]
    done = CliRunner().invoke(app, [*command, "--request", json.dumps(FORM)])
    assert done.exit_code == 0, done.output
    record = (out / "judgements.jsonl").read_text()
    lines = [json.loads(line) for line in record.splitlines()]
    assert len(lines) == len(rows) * 2 * (1 + 3)
    assert all(line["choice"] in (1, 2) and 0 < line["tokens"] <= 48 for line in lines)
    texts = {line["text"] for line in lines if line["row"] == 0 and line["order"] == "12" and line["temperature"] > 0}
    assert len(texts) > 1, "samples differ by their seeds"
    found = json.loads((out / "bench.json").read_text())
    assert found["categories"]["c"]["greedy"]["agreement_pairs"] == len(rows)
    assert (out / "bench.svg").read_text().startswith("<?xml")
    told = [line["judged"]["consistent"] for line in lines if line["temperature"] > 0]
    judged = found["vote_budget"]["judged"]
    assert (judged["consistent"], judged["inconsistent"], judged["unknown"]) == (told.count(True), told.count(False), 0)
    assert {"both orders, by log-prob", "both orders, judge-filtered"} <= {
        point["method"] for point in found["vote_budget"]["points"]
    }
    assert CliRunner().invoke(app, [*command, "--request", json.dumps(FORM)]).exit_code == 0
    assert (out / "judgements.jsonl").read_text() == record


def test_the_service_serves_it(shared_pool: RolloutPool, image_paths: tuple[str, ...]) -> None:
    """The whole way of a request: HTTP, guard, wire, supervised servers, vLLM."""
    from starlette.testclient import TestClient

    from megatron_r1reward.serving.service import RewardService, build_app
    from megatron_r1reward.serving.wire import Limits

    served = ServedModel(shared_pool.group, model=SERVED_NAME, options=ASK)
    service = RewardService(
        Backend(model=served, loop=shared_pool.group.loop),
        Limits(image_roots=(Path(image_paths[0]).parent,)),
        concurrency=4,
    )
    with TestClient(build_app(service, token="secret")) as http:
        body = {"question": "Which?", "responses": ["a", "b", "c"], "images": [Path(image_paths[0]).name]}
        assert http.post("/v1/rank", json=body).status_code == 401
        answer: httpx.Response = http.post("/v1/rank", json=body, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200, answer.text
    assert sorted(answer.json()["order"]) == [0, 1, 2]
    assert answer.json()["unparsable"] == 0
    shared_pool.group.loop.run(served.aclose())


def test_a_client_that_goes_away_frees_the_servers_work(shared_pool: RolloutPool) -> None:
    """vLLM ends what nobody waits for: it generates less than it was asked for."""
    extra = {"extra_body": {"min_tokens": 500, "ignore_eos": True}}
    asked = AskOptions(max_tokens=500, request_extra=extra)
    served = ServedModel(shared_pool.group, model=SERVED_NAME, options=asked)
    service = Running(backend=Backend(model=served, loop=shared_pool.group.loop))
    body = json.dumps({"question": "Which?", "responses": ["a", "b"], "votes": 16}).encode()
    before = generated(shared_pool)
    try:
        address = urlsplit(service.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            head = (
                "POST /v1/compare HTTP/1.1",
                "Host: a",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            )
            client.sendall("\r\n".join([*head, "", ""]).encode() + body)
            wait_until(lambda: requests_running(shared_pool) > 0)
        wait_until(lambda: requests_running(shared_pool) == 0)
        assert generated(shared_pool) - before < 2 * 16 * 500
        wait_until(lambda: service.service.admission.in_progress == 0)
    finally:
        service.stop()
        shared_pool.group.loop.run(served.aclose())


def generated(pool: RolloutPool) -> float:
    """Tokens, since the server's start."""
    ((url, token),) = pool.group.endpoints()
    text = httpx.get(f"{url}/metrics", headers=bearer(token), timeout=PATIENCE_S).text
    wanted = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total{")]
    assert wanted
    return sum(float(line.split()[-1]) for line in wanted)


def test_a_pointwise_model_is_asked_as_it_is_trained(
    shared_pool: RolloutPool, tiny_folder: Path, image_paths: tuple[str, ...], tmp_path: Path
) -> None:
    """On the chat route of the same servers: the tokens of a request are those of the trainer's prompt. One call a
    response and vote; without a readable rating there is no verdict."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / FILE).write_text(PromptPolicy(kind="pointwise", template=POINTWISE_TEMPLATE, orders="any").to_json())
    ((url, token),) = shared_pool.group.endpoints()
    tokenizer = load_tokenizer(folder)
    builder = PromptBuilder(tokenizer, 4096, template=POINTWISE_TEMPLATE)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)  # the server shows one for each patch
    asked = JudgePrompt(template=POINTWISE_TEMPLATE)
    for pair in scalar_pairs(image_paths):
        item = Item.of(pair.question, pair.image_paths)
        for place, response in enumerate(pair.responses):
            chat = asked.messages(item.question, (response, ""), item.images)
            body = {"model": SERVED_NAME, "messages": chat}
            read = httpx.post(f"{url}/tokenize", json=body, headers=bearer(token), timeout=PATIENCE_S).json()
            once = [token for token, after in pairwise([*read["tokens"], -1]) if (token, after) != (image, image)]
            assert once == list(builder.build(pair, swapped=place == 1).token_ids)

    def connect(options: AskOptions) -> RewardModel:
        return RewardModel.connect(url, model=SERVED_NAME, api_key=token, options=options, folder=folder)

    with connect(AskOptions(max_tokens=8)) as model:
        compared = model.compare("Which?", ("a", "b"), image_paths[:2])
        assert (compared.verdict, compared.counts.unparsable) == (None, 1), "random weights say no rating"
    form = {"structured_outputs": {"regex": "<think>[a-z]{1,8}</think><answer>([1-9]|10)</answer>"}}
    with connect(AskOptions(max_tokens=48, request_extra={"extra_body": form})) as model:
        ranking, again = (model.rank("Which?", ["a", "b", "c"], image_paths[:2], votes=4) for _ in range(2))
    assert (ranking.kind, ranking.calls, ranking.unparsable) == ("pointwise", 12, 0)
    assert all(1.0 <= reward <= 10.0 for reward in ranking.rewards)
    assert ranking.best == max(range(3), key=ranking.rewards.__getitem__)
    assert again.rewards == ranking.rewards


@pytest.fixture(scope="module")
def scalar_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Scalar reward models with a head of 1 and of 2 layers."""
    folder = tmp_path_factory.mktemp("scalar")
    return {layers: with_scalar_head(tiny_folder, folder / str(layers), layers) for layers in (1, 2)}


@pytest.fixture(scope="module")
def scalar_servers(
    scalar_folders: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, VllmServer]]:
    """One server of each, started side by side."""
    logs = tmp_path_factory.mktemp("scalar-logs")
    servers = {
        layers: VllmServer(SERVER, model_path=folder, log_path=logs / f"{layers}.log", served_name="reward-model")
        for layers, folder in scalar_folders.items()
    }
    try:
        start_servers(servers.values())
        yield servers
    finally:
        for server in servers.values():
            server.close()


def scalar_pairs(image_paths: tuple[str, ...]) -> list[Preference]:
    said = (("It is 1.", "It is 2."), ("yes", "no, it is <not> that."), ("The digit is 7. ", ""))
    return [
        Preference(id=str(n), question=f"Which digit? {n}", responses=pair, label=1, image_paths=image_paths[:n])
        for n, pair in enumerate(said)
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_servers_rewards_are_the_trainers(
    scalar_folders, scalar_servers, layers: int, topology: Topology, image_paths: tuple[str, ...], tmp_path: Path
) -> None:
    """The same tokens, the same head in float32; with no image, one and two."""
    tree = {
        "run": {"output_dir": tmp_path},
        "model": {"path": scalar_folders[layers], "precision": "fp32"},
        "data": {"train": tmp_path, "token_budget": 300},
    }
    state = build_state(RunConfig.model_validate(tree), topology, optimizer_steps=1, score_layers=layers)
    pairs = scalar_pairs(image_paths)
    expected = rm.score_sequences(state, rm.to_sequences(state, pairs))
    server = scalar_servers[layers]
    with RewardModel.connect(server.url, api_key=server.token, folder=scalar_folders[layers]) as model:
        found = [one for pair in pairs for one in model.score(pair.question, pair.responses, pair.image_paths)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(one, 2) for one in found}) == len(found), "rewards depend on what is read"


def test_a_scalar_model_is_used_by_the_same_commands(
    scalar_folders, scalar_servers, image_paths: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score` with --best-of, `bench` and `eval`, each by the command line: one number for a response."""
    server, folder = scalar_servers[1], scalar_folders[1]
    monkeypatch.setenv("SCALAR_KEY", server.token)
    access = ["--model", server.url, "--prompt-of", str(folder), "--api-key-variable", "SCALAR_KEY"]

    def command(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.output

    rows = tmp_path / "in.jsonl"
    responses = ["a", "b", "c", "It is 7."]
    rows.write_text(json.dumps({"question": "q", "responses": responses, "images": [image_paths[0]]}) + "\n")
    command("score", str(rows), str(tmp_path / "out.jsonl"), *access, "--best-of", str(tmp_path / "best.jsonl"))
    scored = json.loads((tmp_path / "out.jsonl").read_text())
    assert (scored["calls"], scored["best"]) == (4, max(range(4), key=scored["rewards"].__getitem__))
    assert json.loads((tmp_path / "best.jsonl").read_text())["response"] == responses[scored["best"]]
    refused = CliRunner().invoke(app, ["score", str(rows), str(tmp_path / "x"), *access, "--votes", "3"])
    assert (refused.exit_code, "one number" in refused.output) == (2, True)
    with (
        RewardModel.connect(server.url, api_key=server.token) as unknown,
        pytest.raises(ModelRefusedError, match=r"answered 404: .*another kind of model"),
    ):
        unknown.compare("Which?", ("a", "b"))

    pairs = scalar_pairs(image_paths)
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(
        json.dumps({"id": one.id, "question": one.question, "image": list(one.image_paths), "category": "c",
                    "response_1": one.responses[0], "response_2": one.responses[1] or "none", "answer": 1}) + "\n"
        for one in pairs
    ))  # fmt: skip
    command("bench", "pairs", str(source), *access, "--out", str(tmp_path / "bench"), "--image-root", "/")
    bench = json.loads((tmp_path / "bench" / "bench.json").read_text())
    record = (tmp_path / "bench" / "judgements.jsonl").read_text().splitlines()
    assert (bench["kind"], bench["calls"], len(record)) == ("scalar", 2 * len(pairs), len(pairs))
    greedy = bench["overall"]["greedy"]
    assert greedy["better_first"] == greedy["better_second"]
    assert greedy["agreement"]["mean"] == 1.0
    assert "voting: a response has one number" in (tmp_path / "bench" / "bench.md").read_text()

    run_file = tmp_path / "eval.toml"
    run_file.write_text(
        f'[run]\noutput_dir = "{tmp_path}/eval"\n[model]\npath = "{folder}"\n[data]\ntrain = "{source}"\n'
        f'image_root = "/"\n[evaluation]\ndata = "{source}"\nimage_root = "/"\n'
        f'[rollout]\nurls = ["{server.url}"]\ntoken_variable = "SCALAR_KEY"\n'
    )
    command("eval", str(run_file))
    found = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert (found["kind"], found["counts"]["pairs"], found["calls"]) == ("scalar", len(pairs), 2 * len(pairs))
    assert found["accuracy"] == greedy["mean"]["mean"]
    assert found["tokens"] == bench["tokens"]
