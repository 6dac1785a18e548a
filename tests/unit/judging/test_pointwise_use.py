"""A pointwise reward model in use: what is asked, what follows from ratings, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from running_service import Running
from scripted_server import Action, ScriptedServer
from typer.testing import CliRunner

from megatron_r1reward import RewardModel, Votes
from megatron_r1reward.cli import app
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.prompt import POINTWISE_TEMPLATE, preference_messages
from megatron_r1reward.evaluation.calibration import calibrate_folder
from megatron_r1reward.evaluation.result import parse_evaluation
from megatron_r1reward.evaluation.scalar_evaluation import ABSENT, evaluate_scalar
from megatron_r1reward.hub.model_card import Evaluation, card_text
from megatron_r1reward.judging.ask import AskOptions, Item, image_url
from megatron_r1reward.judging.compare import compare
from megatron_r1reward.judging.rewards import Reward, kind_of, read_rewards
from megatron_r1reward.judging.votes import Adaptive
from megatron_r1reward.launch.stage_models import check_settings, model_problems
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.serving.service import Backend
from megatron_r1reward.types import Preference

POLICY = PromptPolicy(kind="pointwise", template=POINTWISE_TEMPLATE, orders="any")
RATINGS = {"good": (9, 10, 8), "fair": (5, 7, 6), "bad": (2, 1, 2), "equal": (5, 7, 6), "silent": ("", "n/a", "")}


class Rater(ScriptedServer):
    """Rates the response that it is shown as `RATINGS` says, and thinks of it."""

    def _take(self, body: dict) -> Action:
        super()._take(body)
        shown = re.search(r"\[Response\]:\n(.*?)  \n", body["messages"][0]["content"][-1]["text"])
        assert shown is not None
        said = RATINGS[shown[1]][: body["n"]]
        return tuple(f"<think>About {shown[1]}.</think><answer>{rating}</answer>" for rating in said)


@pytest.fixture
def rater() -> Iterator[Rater]:
    server = Rater([""])
    yield server
    server.stop()


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder that says that it is a pointwise model's."""
    made = tmp_path / "model"
    made.mkdir()
    for path in tiny_folder.iterdir():
        (made / path.name).symlink_to(path)
    (made / FILE).write_text(POLICY.to_json())
    return made


@pytest.fixture
def model(rater: Rater, folder: Path) -> Iterator[RewardModel]:
    with RewardModel.connect(rater.url, folder=folder, options=AskOptions(retries=0)) as connected:
        yield connected


def test_a_response_is_asked_about_alone_as_in_training(model: RewardModel, rater: Rater, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    assert model.score("Which?", ["good"], [path]) == (9.0,)
    (request,) = rater.requests
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"] == image_url(path)
    (turn,) = preference_messages("Which?", ("good", ""), 1, template=POINTWISE_TEMPLATE)
    assert text == turn["content"][1]
    assert (request["n"], request["temperature"]) == (1, 0.0)
    assert "logprobs" not in request


def test_two_responses_are_compared_by_their_ratings(model: RewardModel, rater: Rater) -> None:
    found = model.compare("Which?", ("bad", "good"))
    assert (found.verdict, found.orders_agree, found.tokens, len(rater.requests)) == (2, True, 10, 2)
    assert found.probability == pytest.approx(1 / (1 + math.exp(7.0)))
    assert found.reasoning == "Response 1: About bad.\n\nResponse 2: About good."
    said = json.loads(found.judgements[0].text)
    assert said["rewards"] == [2.0, 9.0]
    assert read_rewards(found.judgements[0].text) == 2
    tie = model.compare("Which?", ("fair", "equal"))
    assert (tie.verdict, tie.probability, tie.counts.unparsable) == (None, 0.5, 0)
    silent = model.compare("Which?", ("silent", "good"))
    assert (silent.verdict, silent.probability, silent.share, silent.counts.unparsable) == (None, None, None, 1)
    assert read_rewards(silent.judgements[0].text) is None


def test_n_candidates_are_n_calls_and_several_votes_their_mean(model: RewardModel, rater: Rater) -> None:
    texts = ["bad", "good", "silent", "fair", "bad", "equal"]
    once = model.rank("Which?", texts, schedule="all_pairs")
    assert (once.kind, once.order, once.rewards) == ("pointwise", (1, 3, 5, 0, 4, 2), (2.0, 9.0, 0.0, 5.0, 2.0, 5.0))
    assert (once.calls, len(rater.requests), once.unparsable, once.ties, once.tokens) == (5, 5, 1, 1, 25)
    assert once.standard_errors == (0.0,) * 6
    several = model.rank("Which?", ["bad", "good"], votes=3)
    assert several.rewards == pytest.approx((5 / 3, 9.0))
    assert several.standard_errors == pytest.approx((1 / 3, 1 / 3**0.5))
    assert (several.calls, rater.requests[-1]["n"], rater.requests[-1]["temperature"]) == (6, 3, 1.0)
    seeds = [request["seed"] for request in rater.requests[-2:]]
    assert len(set(seeds)) == 2, "each response has a seed of its own"
    model.rank("Which?", ["bad", "good"], votes=3)
    assert sorted(request["seed"] for request in rater.requests[-2:]) == sorted(seeds)


def test_what_means_nothing_is_refused(model: RewardModel) -> None:
    with pytest.raises(ValueError, match="votes: adaptive sampling decides between two responses"):
        model.compare("Which?", ("good", "bad"), votes=Votes(adaptive=Adaptive()))
    for option in ({"budget": 4}, {"rounds": 2}):
        with pytest.raises(ValueError, match=r"(budget 4|rounds 2): a pointwise reward model compares no pairs"):
            model.rank("Which?", ["good", "bad"], **option)
    with pytest.raises(ValueError, match="no candidates"):
        model.rank("Which?", [])


def test_the_images_of_a_response_are_shown_with_it_alone() -> None:
    seen: list[tuple[str, Item]] = []

    class Head:
        async def rate(self, item: Item, response: str, *, n: int, temperature: float, seed: int) -> Reward:
            seen.append((response, item))
            return Reward(value=5.0, tokens=1, texts=("",))

    item = Item(question="Which?", images=("q", "a", "b", "c"), response_images=(1, 2))
    assert kind_of(Head()) == "pointwise"
    asyncio.run(compare(Head(), item, ("one", "two"), Votes()))
    assert {text: (one.images, one.response_images) for text, one in seen} == {
        "one": (("q", "a"), (1, 0)), "two": (("q", "b", "c"), (2, 0)),
    }  # fmt: skip


def test_the_service_and_other_trainers_get_ratings(model: RewardModel, rater: Rater) -> None:
    backend = Backend(model=model.model, loop=model._loop)
    service = Running(backend=backend, on_failure="raise")
    try:
        ranked = service.post("/v1/rank", {"question": "Which?", "responses": ["bad", "good"], "votes": 3}).json()
        assert (ranked["kind"], ranked["order"], ranked["calls"]) == ("pointwise", [1, 0], 6)
        assert ranked["comparisons"][0]["judgements"][0]["reasoning"].startswith("Response 1: About")
        assert service.post("/slime", {"prompt": "Which?", "response": "good"}).json() == 9.0, "nothing waits"
    finally:
        service.stop()
    loop = EventLoopThread("refused")
    with pytest.raises(ValueError, match='on_failure "neutral": a pointwise reward model has no reward of a draw'):
        Running(backend=backend, on_failure="neutral")
    loop.close()


def pairs() -> list[Preference]:
    made = [("good", "bad", 1), ("good", "bad", 2), ("fair", "equal", 1), ("silent", "bad", 1)]
    return [
        Preference(id=str(n), question=f"Which? {n}", responses=(one, two), label=label, image_paths=())  # type: ignore[arg-type]
        for n, (one, two, label) in enumerate(made)
    ]


def test_an_evaluation_counts_what_has_no_rating(model: RewardModel, folder: Path, tmp_path: Path) -> None:
    found = evaluate_scalar(model.model, lambda work: model.run(work), pairs(), seed=0)  # type: ignore[arg-type]
    assert (found.kind, found.accuracy, found.unrated) == ("pointwise", (1.0 + 0.0 + 0.5 + 0.0) / 4, 1)
    assert (found.counts.pairs, found.calls, found.tokens) == (4, 8, 40)
    assert set(found.absent) == set(ABSENT["pointwise"])
    assert parse_evaluation(found.to_json()) == found
    card = card_text(POLICY, name="org/rater", evaluations=[Evaluation(path=tmp_path, result=found)], licence=None)
    assert "A pointwise reward model" in card and "It reads one response." in card
    assert "| by construction | 1 of 8 ratings |" in card
    with pytest.raises(ValueError, match="is a pointwise reward model, which has no votes to calibrate"):
        calibrate_folder(folder, tmp_path / "evaluation.json")


@pytest.mark.slow
def test_the_commands_take_it(rater: Rater, folder: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"question": "Which?", "responses": ["bad", "good", "fair"]}) + "\n")
    access = ["--model", rater.url, "--prompt-of", str(folder)]
    command("score", str(rows), str(tmp_path / "out.jsonl"), *access, "--votes", "3")
    scored = json.loads((tmp_path / "out.jsonl").read_text())
    assert (scored["kind"], scored["best"], scored["calls"]) == ("pointwise", 1, 9)
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(
        json.dumps({"id": one.id, "question": one.question, "response_1": one.responses[0],
                    "response_2": one.responses[1], "answer": one.label}) + "\n"
        for one in pairs()
    ))  # fmt: skip
    asked = len(rater.requests)
    command("bench", "pairs", str(source), *access, "--out", str(tmp_path / "bench"))
    bench = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (bench["kind"], bench["calls"], len(rater.requests) - asked, bench["tokens"]) == ("pointwise", 8, 8, 40)
    assert bench["overall"]["greedy"]["better_first"] == bench["overall"]["greedy"]["better_second"]
    lines = [json.loads(line) for line in (tmp_path / "bench" / "judgements.jsonl").read_text().splitlines()]
    assert [line["right"] for line in sorted(lines, key=lambda line: line["row"])] == [True, False, None, None]
    assert (
        "A pointwise reward model: 8 responses scored, 40 tokens generated" in (tmp_path / "bench/bench.md").read_text()
    )
    again = ["bench", "pairs", str(source), *access, "--out", str(tmp_path / "bench"), "--samples", "3"]
    refused = CliRunner().invoke(app, again)
    assert (refused.exit_code, "--samples: a pointwise reward model rates each response" in refused.output) == (2, True)


@pytest.fixture
def command() -> Callable[..., str]:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_an_evaluation_asks_as_the_folder_says(folder: Path, tmp_path: Path) -> None:
    def config(**prompt: str) -> RunConfig:
        tree = {"run": {"output_dir": tmp_path}, "model": {"path": folder}, "data": {"train": tmp_path / "t.jsonl"}}
        return RunConfig.model_validate(tree | {"prompt": prompt, "rollout": {"urls": ["http://127.0.0.1:1"]}})

    assert not [text for _, _, text in model_problems(config(), "eval") if FILE in text]
    problems = [text for _, _, text in model_problems(config(kind="generative"), "eval")]
    assert any("says kind 'pointwise', and prompt.kind or rl.pairing 'generative'" in text for text in problems)
    filtered = config().model_copy(update={"evaluation": config().evaluation.model_copy(
        update={"judge_filtered_votes": True})})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"judge_filtered_votes: the pointwise reward model in .* no reasoning about a pair"
    ):
        check_settings(filtered, "eval")
