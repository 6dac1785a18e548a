"""The reward service on a port of this machine, before a judge with known strengths that can be held and broken."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx
import uvicorn
from simulated_judge import SimulatedJudge
from waiting import wait_until

from megatron_r1reward.judging.ask import ModelUnavailableError
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.serving.cohorts import Policy
from megatron_r1reward.serving.other_trainers import add_routes, cohorts_of
from megatron_r1reward.serving.service import Backend, RewardService, build_app
from megatron_r1reward.serving.wire import Limits

STRENGTHS = {"good": 9.0, "fair": 0.0, "bad": -9.0}


class HeldJudge(SimulatedJudge):
    """Answers only when the door is open; knows who waits and who left."""

    def __init__(self) -> None:
        super().__init__(STRENGTHS)
        self.door = threading.Event()
        self.door.set()
        self.waiting = self.cancelled = 0
        self.broken = False

    async def judge(self, *asked, **how):
        self.waiting += 1
        try:
            while not self.door.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        if self.broken:
            raise ModelUnavailableError("no server")
        return await super().judge(*asked, **how)


class Running:
    """The service on a port of this machine, before a judge that is simulated or, with `backend`, real servers."""

    def __init__(
        self,
        *,
        backend: Backend | None = None,
        token: str | None = None,
        concurrency: int = 64,
        cohort_size: int = 3,
        cohort_deadline_s: float = 600.0,
        on_failure: Policy = "raise",
        policy: PromptPolicy | None = None,
        **limits,
    ) -> None:
        self.judge, self.loop = HeldJudge(), EventLoopThread("test-model")
        simulated = Backend(model=self.judge, loop=self.loop)
        self.service = RewardService(backend or simulated, Limits(**limits), concurrency=concurrency, policy=policy)
        self.socket = socket.create_server(("127.0.0.1", 0))
        app = build_app(self.service, token=token)
        self.cohorts = cohorts_of(self.service, size=cohort_size, deadline_s=cohort_deadline_s, on_failure=on_failure)
        add_routes(app, self.service, self.cohorts)
        config = uvicorn.Config(app, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def stop(self) -> None:
        self.judge.door.set()
        self.server.should_exit = True
        self.thread.join()
        self.http.close()
        self.loop.close()
