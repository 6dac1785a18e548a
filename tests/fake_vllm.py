"""A local HTTP server that answers like vLLM's generate and administration routes, or fails in a chosen way."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from local_server import LocalServer
from waiting import Door

from megatron_r1reward.types import Prompt
from megatron_r1reward.weight_sync.admin_api import ControlPlane
from megatron_r1reward.weight_sync.buckets import BucketSource, WeightUpdate
from megatron_r1reward.weight_sync.protocol import Transport

MEMORY = {"weights", "kv_cache"}
NEEDS_WEIGHTS = {"/start_weight_update", "/update_weights", "/finish_weight_update"}
FOR_EVER_S = 3600.0
Fault = str | int  # "ok" or the name of a fault; an HTTP status


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the plan."""


class FakeVllm(LocalServer):
    """Answers every generate request according to `fault`; routes in `refused` answer 500, those in `hanging` nothing.

    Generate requests are behind `door` until their answer is sent: a client that has it finds them gone. Asleep it
    cannot generate, and takes no weights before their memory is back.
    """

    def __init__(self, fault: Fault = "ok") -> None:
        self.fault = fault
        self.door = Door()
        self.refused: set[str] = set()
        self.hanging: set[str] = set()
        self.refusal = 500
        self.version = "default"
        self.keeps_version = False
        self.resident = set(MEMORY)
        self.calls: list[str] = []  # "METHOD /path?query", in order of arrival
        self._stopping = threading.Event()
        super().__init__(self._handler(), _QuietServer)

    @property
    def generate_calls(self) -> int:
        return sum("/inference/v1/generate" in call for call in self.calls)

    def stop(self) -> None:
        self._stopping.set()
        self.door.open()
        super().stop()

    def _generate(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.resident != MEMORY:
            return 500, json.dumps({"error": {"message": f"only {self.resident} is resident"}})
        params = body["sampling_params"]
        answer = {"choices": [self.choice(index, params["seed"] + index) for index in range(params["n"])]}
        if isinstance(self.fault, int):
            return self.fault, json.dumps({"error": {"message": f"fault {self.fault}"}})
        if self.fault == "hang":
            self._stopping.wait(FOR_EVER_S)
        elif self.fault == "garbage":
            return 200, "<html>gateway</html>"
        elif self.fault == "one sample short":
            answer["choices"].pop()
        elif self.fault == "log-probs of other tokens":
            answer["choices"][0]["logprobs"]["content"][0]["token_id"] += 1
        elif self.fault == "no log-prob":
            answer["choices"][0]["logprobs"]["content"][0]["logprob"] = -9999.0
        return 200, json.dumps(answer)

    def choice(self, index: int, seed: int) -> dict[str, Any]:
        """One sample of an answer."""
        return _choice(index, seed, self.version)

    def _administer(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, str]:
        if path in self.refused or (path in NEEDS_WEIGHTS and "weights" not in self.resident):
            return self.refusal, json.dumps({"error": {"message": f"{path} refused"}})
        if path == "/sleep":
            self.resident.clear()
        if path == "/wake_up":
            self.resident.update(query["tags"])
        if path == "/finish_weight_update" and not self.keeps_version:
            self.version = body["weight_version"]
        answers = {"/weight_info": {"weight_version": self.version}, "/get_world_size": {"world_size": 1}}
        return 200, json.dumps(answers.get(path, {}))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._serve("GET")

            def do_POST(self) -> None:
                self._serve("POST")

            def _serve(self, method: str) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null") or {}
                url = urlsplit(self.path)
                path, query = url.path, parse_qs(url.query)
                fake.calls.append(f"{method} {self.path}")
                if path in fake.hanging:
                    fake._stopping.wait(FOR_EVER_S)
                    self.close_connection = True
                    return
                if path != "/inference/v1/generate":
                    status, text = fake._administer(path, query, body)
                else:
                    with fake.door:
                        status, text = fake._generate(body)
                    if fake.fault == "drop":
                        self.close_connection = True
                        return
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class Silent(Transport):
    """A transport that takes the tensors and carries them nowhere, to see the steps around it."""

    device = torch.device("cpu")

    def connect(self, control: ControlPlane, source: BucketSource) -> None:
        pass

    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        for _ in source:
            pass

    def disconnect(self) -> None:
        pass


def _choice(index: int, seed: int, version: str) -> dict[str, Any]:
    """Three tokens that depend on the seed only, as a server's would."""
    ids = [seed % 97, seed % 89, 2]
    return {
        "index": index,
        "finish_reason": "stop",
        "token_ids": ids,
        "logprobs": {"content": [{"token_id": token_id, "logprob": -0.5} for token_id in ids]},
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
    }


class Words:
    """A tokenizer whose token 4 is the image placeholder."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))

    def convert_tokens_to_ids(self, tokens: str) -> int:
        assert tokens == "<|image_pad|>"
        return 4


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", preference_id=f"p{i}", token_ids=(i + 10,), image_paths=(), label=1, swapped=False)
        for i in range(count)
    ]
