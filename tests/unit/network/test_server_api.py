"""Everybody who asks a server for health or administration sends the same and hears the same."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from local_server import LocalServer

from megatron_r1reward.network.server_api import (
    ServerCallError,
    call,
    call_async,
    open_async_client,
    open_client,
    unhealthy,
)
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import ControlPlane, Target

DONE = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/hang":
            DONE.wait()
            return
        if self.path == "/elsewhere/health":
            self.send_response(302)
            self.send_header("Location", "/page")
            self.end_headers()
            return
        if self.path in ("/page", "/cut/health"):
            self.send_response(200)
            self.send_header("Content-Length", "4" if self.path == "/page" else "40")
            self.end_headers()
            self.wfile.write(b"page")
            return
        allowed = self.headers.get("Authorization") == "Bearer s3cret"
        status = 401 if not allowed else {"/broken": 500, "/moved": 302}.get(self.path, 200)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(f"said {status}".encode())

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    DONE.clear()
    server = LocalServer(Handler)
    yield server.url
    DONE.set()
    server.stop()


def both(url: str, *, token: str | None = "s3cret", timeout_s: float = 60.0) -> list[str]:
    """What the two kinds of call answer, or the messages of their errors."""

    async def ask() -> str:
        async with open_async_client() as client:
            return (await call_async(client, "POST", url, token=token, body={"a": 1}, timeout_s=timeout_s)).text

    found = []
    with open_client(timeout_s=timeout_s) as client:
        for answer in (lambda: call(client, "POST", url, token=token, body={"a": 1}).text, lambda: asyncio.run(ask())):
            try:
                found.append(answer())
            except ServerCallError as error:
                found.append(str(error))
    return found


def test_an_answer_is_the_servers(server: str) -> None:
    assert both(f"{server}/pause") == ["said 200"] * 2


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [("/pause", None, 401), ("/pause", "wrong", 401), ("/broken", "s3cret", 500), ("/moved", "s3cret", 302)],
)
def test_a_refusal_names_call_server_and_status(server: str, path: str, token: str | None, status: int) -> None:
    assert both(server + path, token=token) == [f"POST {server}{path} answered {status}: said {status}"] * 2


def test_no_answer_names_call_and_server(server: str) -> None:
    sync, concurrent = both(f"{server}/hang", timeout_s=0.05)
    assert sync == f"POST {server}/hang failed: ReadTimeout timed out"
    assert concurrent == f"POST {server}/hang: no answer within 0.05 s"


def test_nobody_there_is_said_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is not asked
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for message in both(f"{url}/pause"):
            assert message.startswith(f"POST {url}/pause failed: ConnectError ")
        assert "refused" in (unhealthy(url, attempts=1) or "")


def test_a_server_that_refuses_is_not_healthy(server: str) -> None:
    assert unhealthy(server, attempts=1) == "HTTP Error 401: Unauthorized"  # vLLM's /health asks for no token


def test_who_sends_us_elsewhere_or_breaks_off_is_not_healthy(server: str) -> None:
    assert unhealthy(f"{server}/elsewhere", attempts=1) == "HTTP Error 302: Found"
    assert "IncompleteRead" in str(unhealthy(f"{server}/cut", attempts=1))


def test_an_answer_that_is_no_json_is_that_servers_failure(server: str) -> None:
    control = ControlPlane([Target(name="a", url=server)], timeout_s=60)
    (answer,) = control.call("/page", method="GET").values()
    control.close()
    assert isinstance(answer, WeightPushError)
    assert str(answer) == f"GET {server}/page answered no JSON: page"


def test_a_closed_client_is_no_crash(server: str) -> None:
    client = open_client(timeout_s=1)
    client.close()
    with pytest.raises(ServerCallError, match=rf"GET {server}/health failed: RuntimeError"):
        call(client, "GET", f"{server}/health", token=None)
