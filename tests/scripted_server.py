"""A local HTTP server that speaks just enough of the OpenAI protocol to fail in chosen ways."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler

from local_server import LocalServer
from waiting import Door

# A reply's text, or those of several choices; an HTTP status to fail with; seconds to hang
Action = str | tuple[str, ...] | int | float
HTML, BAD_JSON, WRONG_SHAPE = "<html>gateway</html>", "{broken json", '{"choices": []}'


class ScriptedServer(LocalServer):
    """Answers the n-th chat call with the n-th action, the last one for ever; counts what happens.

    Requests are behind a door until their answer is sent: `chat`, or `models` for the list of models.
    """

    def __init__(self, actions: Sequence[Action]) -> None:
        self.actions = list(actions)
        self.requests: list[dict] = []
        self.chat, self.models = Door(), Door()
        self.model_lookups = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        super().__init__(self._handler())

    def stop(self) -> None:
        self._stopping.set()
        self.chat.open()
        self.models.open()
        super().stop()

    def _take(self, body: dict) -> Action:
        with self._lock:
            self.requests.append(body)
            return self.actions[min(len(self.requests), len(self.actions)) - 1]

    def _reply(self, body: dict) -> tuple[int, str, str]:
        """Status, content type and body of one chat call."""
        with self.chat:
            action = self._take(body)
        if isinstance(action, int):
            return action, "application/json", json.dumps({"error": {"message": "scripted failure"}})
        if isinstance(action, float):
            self._stopping.wait(action)
            return 200, "application/json", completion("1")
        if action == HTML:
            return 200, "text/html", action
        if action in (BAD_JSON, WRONG_SHAPE):
            assert isinstance(action, str)
            return 200, "application/json", action
        return 200, "application/json", completion(action)

    def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with server._lock:
                    server.model_lookups += 1
                with server.models:
                    pass
                self._send(200, "application/json", json.dumps({"data": [{"id": "judge-model"}]}))

            def do_POST(self) -> None:
                self._send(*server._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

            def _send(self, status: int, content_type: str, text: str) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", content_type)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except BrokenPipeError:
                    pass  # the client gave up, as a test of timeouts wants it to

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def completion(said: str | tuple[str, ...]) -> str:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "logprobs": None,
        }
        for index, text in enumerate((said,) if isinstance(said, str) else said)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 5 * len(choices), "total_tokens": 1 + 5 * len(choices)}
    tree = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}
    return json.dumps(tree)
