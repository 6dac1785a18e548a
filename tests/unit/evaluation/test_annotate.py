"""Against a real HTTP server that speaks the OpenAI protocol, faults included."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_r1reward.data.difficulty import AttemptRecord, read_records, select_hard
from megatron_r1reward.evaluation.annotate import Budget, annotate
from megatron_r1reward.types import Preference

Reply = tuple[int, bytes]


class Endpoint:
    """Calls `behave(pair name, how often it was asked before)` for the reply and keeps the requests."""

    def __init__(self, behave: Callable[[str, int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._asked: Counter[str] = Counter()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = endpoint.pair_name(request)
                endpoint.requests.append(request)
                status, body = behave(name, endpoint._asked[name])
                endpoint._asked[name] += 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Retry-After-Ms", "1")  # keeps the client's pauses short
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @staticmethod
    def pair_name(request: dict[str, Any]) -> str:
        text: str = request["messages"][0]["content"][-1]["text"]
        return text.split("[Question]:\n")[1].split("  \n")[0]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, int], Reply]], Endpoint]]:
    running: list[Endpoint] = []

    def start(behave: Callable[[str, int], Reply]) -> Endpoint:
        running.append(Endpoint(behave))
        return running[-1]

    yield start
    for endpoint in running:
        endpoint.close()


def says(answer: object, usage: dict[str, int] | None = None) -> Reply:
    content = f"<think>I looked.</think><answer>{answer}</answer>"
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
    body |= {"usage": {**usage, "total_tokens": sum(usage.values())}} if usage else {}
    return 200, json.dumps(body).encode()


@pytest.fixture
def preferences(tmp_path: Path) -> list[Preference]:
    """Four pairs whose right answer is 1; the question is the name."""
    path = tmp_path / "seven.png"
    Image.new("RGB", (8, 8), (7, 7, 7)).save(path)
    return [
        Preference(id=name, question=name, responses=("A", "B"), label=1, image_paths=(str(path),))
        for name in ("easy", "second", "never", "odd")
    ]


def run(endpoint: Endpoint, preferences: list[Preference], output: Path, **changes: Any) -> list[AttemptRecord]:
    options: dict[str, Any] = {"max_retries": 2, "concurrency": 4, "timeout_s": 60.0, **changes}
    return annotate(
        preferences, base_url=endpoint.url, model="judge", api_key="secret", max_tokens=64, output=output, **options
    )


def by_name(name: str, asked: int) -> Reply:
    if name == "odd":
        return says("1 or 2")
    return says(1 if name == "easy" or (name == "second" and asked == 1) else 2)


def test_attempts_stop_at_the_first_right_verdict(serve: Any, preferences: list[Preference], tmp_path: Path) -> None:
    endpoint = serve(by_name)
    done: list[int] = []
    records = run(endpoint, preferences, tmp_path / "attempts.jsonl", progress=done.append)
    assert {record.preference_id: record.attempts for record in records} == {
        "easy": (True,),
        "second": (False, True),
        "never": (False, False, False),
        "odd": (False, False, False),  # unparsable is a wrong attempt
    }
    assert [record.preference_id for record in records] == ["easy", "second", "never", "odd"]
    assert set(select_hard(records)) == {"second", "never", "odd"}
    assert sum(done) == 4


def test_requests_carry_prompt_pixels_and_a_seed_of_their_own(
    serve: Any, preferences: list[Preference], tmp_path: Path
) -> None:
    endpoint = serve(by_name)
    run(endpoint, preferences, tmp_path / "attempts.jsonl", temperature=0.7, seed=5)
    never = [request for request in endpoint.requests if Endpoint.pair_name(request) == "never"]
    assert len({request["seed"] for request in never}) == 3
    assert {(request["temperature"], request["max_tokens"], request["model"]) for request in never} == {
        (0.7, 64, "judge")
    }
    image, text = never[0]["messages"][0]["content"]
    head, encoded = image["image_url"]["url"].split(",")
    assert (image["type"], head) == ("image_url", "data:image/png;base64")
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((0, 0)) == (7, 7, 7)
    assert "###### [Response 1]:\nA" in text["text"]


def test_a_second_call_skips_what_is_done(serve: Any, preferences: list[Preference], tmp_path: Path) -> None:
    output = tmp_path / "attempts.jsonl"
    first = serve(by_name)
    done = run(first, preferences[:2], output)
    output.write_bytes(output.read_bytes() + b'{"preference_id": "ne')  # killed while writing
    second = serve(by_name)
    already: list[int] = []
    progress: list[int] = []
    records = run(second, preferences, output, known_already=already.append, progress=progress.append)
    assert (already, sum(progress)) == ([2], 2), "what was known took no time"
    assert {Endpoint.pair_name(request) for request in second.requests} == {"never", "odd"}
    assert records[:2] == done
    assert {record.preference_id for record in read_records(output)} == {"easy", "never", "odd", "second"}


def test_passing_faults_are_retried(serve: Any, preferences: list[Preference], tmp_path: Path) -> None:
    def flaky(name: str, asked: int) -> Reply:
        return (500, b"busy") if asked == 0 else (429, b"slow down") if asked == 1 else says(1)

    endpoint = serve(flaky)
    records = run(endpoint, preferences, tmp_path / "attempts.jsonl")
    assert [record.attempts for record in records] == [(True,)] * 4
    assert len(endpoint.requests) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [(500, b"down"), (400, b"bad request"), (200, b"<html>"), (200, b"{}"), (200, b"[1]"), (200, b'{"choices": []}')],
)
def test_lasting_faults_are_counted_and_not_called_hard(
    fault: Reply, serve: Any, preferences: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "attempts.jsonl"
    endpoint = serve(lambda name, asked: fault if name in {"never", "odd"} else says(1))
    with caplog.at_level(logging.WARNING):
        records = run(endpoint, preferences, output)
    assert [record.preference_id for record in records] == ["easy", "second"]
    assert len(read_records(output)) == 2
    assert "2 of 4 preferences could not be annotated" in caplog.text
    assert len(run(serve(by_name), preferences, output)) == 4  # the next call tries them again


def test_an_image_that_cannot_be_read_is_a_counted_failure(
    serve: Any, preferences: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = dataclasses.replace(preferences[1], image_paths=(str(tmp_path / "gone.png"),))
    with caplog.at_level(logging.WARNING):
        records = run(serve(by_name), [preferences[0], lost], tmp_path / "attempts.jsonl")
    assert [record.preference_id for record in records] == ["easy"]
    assert "gone.png" in caplog.text


def test_an_endpoint_that_is_down_is_an_error(serve: Any, preferences: list[Preference], tmp_path: Path) -> None:
    endpoint = serve(by_name)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        endpoint.url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(RuntimeError, match=r"all 4 preferences failed at http.*APIConnectionError"):
            run(endpoint, preferences, tmp_path / "attempts.jsonl", max_retries=0)
    with pytest.raises(ValueError, match="attempts 0"):
        run(endpoint, preferences, tmp_path / "attempts.jsonl", attempts=0)


def names(endpoint: Any) -> Counter[str]:
    return Counter(Endpoint.pair_name(request) for request in endpoint.requests)


def test_other_content_under_the_same_id_is_asked_about(
    serve: Any, preferences: list[Preference], tmp_path: Path
) -> None:
    output = tmp_path / "attempts.jsonl"
    run(serve(by_name), preferences, output)
    edited = [dataclasses.replace(preferences[0], responses=("A", "C")), *preferences[1:]]
    again = serve(by_name)
    run(again, edited, output)
    assert names(again) == {"easy": 1}
    Image.new("RGB", (8, 8), (9, 9, 9)).save(preferences[1].image_paths[0])  # another picture under the old name
    third = serve(by_name)
    run(third, edited, output)
    assert names(third) == {"easy": 1, "second": 2, "never": 3, "odd": 3}


def test_a_corrected_label_counts_what_is_known_and_asks_for_the_rest(
    serve: Any, preferences: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "attempts.jsonl"
    run(serve(by_name), preferences, output)
    corrected = [dataclasses.replace(pair, label=2, id=f"new-{pair.id}") for pair in preferences]
    endpoint = serve(lambda name, asked: says(2))
    with caplog.at_level(logging.WARNING):
        records = run(endpoint, corrected, output)
    # "easy" said 1, then is asked once more; "second" said 2 at once; "never" as well; "odd" said nothing three times
    assert [record.attempts for record in records] == [(False, True), (True,), (True,), (False, False, False)]
    assert names(endpoint) == {"easy": 1}
    assert "3 preferences have another id, label or limit" in caplog.text
    on_disk = {record.preference_id: record for record in read_records(output)}
    assert [on_disk[record.preference_id] for record in records] == records


def test_more_or_fewer_attempts_go_on_from_what_is_there(
    serve: Any, preferences: list[Preference], tmp_path: Path
) -> None:
    output = tmp_path / "attempts.jsonl"
    run(serve(by_name), preferences, output, attempts=2)
    more = serve(by_name)
    assert [len(record.attempts) for record in run(more, preferences, output, attempts=5)] == [1, 2, 5, 5]
    assert names(more) == {"never": 3, "odd": 3}
    none = serve(by_name)
    assert [len(record.attempts) for record in run(none, preferences, output, attempts=3)] == [1, 2, 3, 3]
    assert [len(record.attempts) for record in run(none, preferences, output, attempts=5)] == [1, 2, 5, 5]
    assert names(none) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.5}, "temperature: 1.0 then, 0.5 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"served": {"weights": "b"}}, "weights: a then, b now"),
    ],
)
def test_another_model_or_way_of_asking_is_asked(
    change: dict[str, Any],
    said: str,
    serve: Any,
    preferences: list[Preference],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "attempts.jsonl"
    run(serve(by_name), preferences[:1], output, served={"weights": "a"})
    endpoint = serve(by_name)
    with caplog.at_level(logging.WARNING):
        run(endpoint, preferences[:1], output, **{"served": {"weights": "a"}, **change})
    assert names(endpoint) == {"easy": 1}
    assert said in caplog.text


def test_records_of_an_earlier_version_are_not_trusted(
    serve: Any, preferences: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "attempts.jsonl"
    output.write_text('{"preference_id": "easy", "attempts": [false, false, false]}\n')
    with caplog.at_level(logging.WARNING):
        records = run(serve(by_name), preferences[:1], output)
    assert records[0].attempts == (True,)
    assert "1 records of an earlier version do not say what was asked" in caplog.text


USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


def costly(name: str, asked: int) -> Reply:
    return says(1 if name == "easy" or asked == 1 else 2, USAGE)


def test_every_attempt_is_kept_with_its_text_seed_usage_and_cost(
    serve: Any, preferences: list[Preference], tmp_path: Path
) -> None:
    output = tmp_path / "attempts.jsonl"
    endpoint = serve(costly)
    records = run(endpoint, preferences[:2], output, budget=Budget(prompt_price=2.0, completion_price=10.0))
    assert [len(record.replies) for record in records] == [1, 2]
    first, second = records[1].replies
    assert (first.text, second.text) == tuple(f"<think>I looked.</think><answer>{n}</answer>" for n in (2, 1))
    assert {reply.seed for reply in records[1].replies} == {
        request["seed"] for request in endpoint.requests if Endpoint.pair_name(request) == "second"
    }
    assert (first.prompt_tokens, first.completion_tokens, first.finish_reason) == (100, 20, "stop")
    assert first.cost == pytest.approx((100 * 2 + 20 * 10) / 1e6)
    assert records[1].asked["model"] == "judge"
    assert {record.preference_id: record for record in read_records(output)}["second"] == records[1]


def test_an_attempt_that_was_answered_is_never_asked_again(
    serve: Any, preferences: list[Preference], tmp_path: Path
) -> None:
    """Killed between two attempts: the first one's row is on the disk already."""
    output = tmp_path / "attempts.jsonl"
    whole = run(serve(by_name), preferences[2:3], tmp_path / "whole.jsonl")
    killed = serve(lambda name, asked: by_name(name, asked) if asked == 0 else (400, b"killed"))
    with pytest.raises(RuntimeError, match="all 2 preferences failed"):
        run(killed, preferences[1:3], output)
    again = serve(lambda name, asked: by_name(name, asked + 1))
    records = run(again, preferences[1:3], output)
    assert names(again) == {"second": 1, "never": 2}
    assert records[1] == whole[0]  # seeds and texts as without the interruption


def test_nothing_is_asked_beyond_the_budget(
    serve: Any, preferences: list[Preference], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "attempts.jsonl"
    endpoint = serve(costly)
    options: dict[str, Any] = {"concurrency": 1}
    with caplog.at_level(logging.WARNING):
        records = run(endpoint, preferences, output, budget=Budget(tokens=240), **options)
    assert len(endpoint.requests) == 2  # 120 tokens each
    assert [record.preference_id for record in records] == ["easy"]
    assert "the budget is spent (240 tokens, cost 0): 3 of 4 preferences are left" in caplog.text
    assert len(run(endpoint, preferences, output, budget=Budget(tokens=240), **options)) == 1  # earlier calls count
    assert len(endpoint.requests) == 2
    assert len(run(endpoint, preferences, output, budget=Budget(tokens=10_000), **options)) == 4
    assert len(endpoint.requests) == 7  # what was asked before is not asked again
    cents = run(serve(costly), preferences, tmp_path / "b.jsonl", budget=Budget(cost=1e-4, prompt_price=1.0), **options)
    assert [record.preference_id for record in cents] == ["easy"]


def test_requests_keep_to_the_rate_limit(serve: Any, preferences: list[Preference], tmp_path: Path) -> None:
    began = time.monotonic()
    run(serve(costly), preferences, tmp_path / "attempts.jsonl", budget=Budget(requests_per_minute=600.0))
    assert time.monotonic() - began >= 0.6  # 7 requests, one in 0.1 s
