"""Bearer guard, circuit breaker, event loop thread."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from megatron_r1reward.network.breaker import CircuitBreaker
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.network.guard import BearerGuard
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, bearer, is_loopback, new_token


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    app = Starlette(routes=[Route(path, hello, methods=["GET", "POST", "OPTIONS"]) for path in ("/pause", "/health")])
    app.add_middleware(BearerGuard)  # type: ignore[arg-type]  # as vLLM does it, without arguments
    return TestClient(app)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "s3cret", "Bearer s3cret2"]
)
def test_nobody_passes_without_the_token(client: TestClient, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    assert client.post("/pause", headers=headers).status_code == 401
    assert client.options("/pause", headers=headers).status_code == 401
    assert client.get("/health", headers=headers).text == "hello"


def test_the_token_opens_all_routes(client: TestClient) -> None:
    assert client.post("/pause", headers=bearer("s3cret")).text == "hello"
    assert client.post("/pause", headers={"authorization": "bearer s3cret"}).text == "hello"


def test_a_guard_without_a_token_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=TOKEN_VARIABLE):
        BearerGuard(Starlette())


def test_tokens_are_long_and_distinct() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    assert len(new_token()) >= 43
    assert bearer(None) == {}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("node1", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_the_breaker_opens_tries_once_and_closes() -> None:
    breaker = CircuitBreaker(2)
    breaker.failure()
    breaker.success()
    breaker.failure()
    assert breaker.admits(), "a success in between starts the count again"
    breaker.failure()
    assert not breaker.admits()
    breaker.half_open()
    assert [breaker.admits(), breaker.admits()] == [True, False]
    breaker.failure()
    assert not breaker.admits()
    breaker.half_open()
    breaker.success()
    assert breaker.admits()


def test_the_loop_thread_runs_cancels_and_ends() -> None:
    loop = EventLoopThread("test")
    assert loop.run(asyncio.sleep(0, "done")) == "done"
    begun = threading.Event()

    async def work() -> None:
        begun.set()
        await asyncio.sleep(3600)

    endless = loop.submit(work())
    assert begun.wait(60)
    loop.close()
    loop.close()
    with pytest.raises(CancelledError):
        endless.result(0)
