"""`r1reward serve`: the model behind HTTP. What /metrics shows: requests, judgements, the servers behind it, samples
without a reward.

    client --guard, size, admission--> route --wire.checked_item--> compare | rank --judge--> vLLM servers

A request that finds the service full hears 429 with Retry-After; one whose client has gone is cancelled, its judgements
with it; on SIGTERM what is in progress is finished and nothing new is taken. /metrics is Prometheus', /openapi.json
describes the routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from megatron_r1reward.judging.ask import Item, ModelUnavailableError
from megatron_r1reward.judging.compare import compare
from megatron_r1reward.judging.rank import rank
from megatron_r1reward.judging.rewards import AnyModel
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.servers.group import NoServerError
from megatron_r1reward.servers.member import ServerStatus
from megatron_r1reward.serving import wire
from megatron_r1reward.serving.admission import Admission, BodyLimit, FullError, ServiceGuard
from megatron_r1reward.serving.wire import Limits, RefusedError

log = logging.getLogger(__name__)
T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
RETRY_AFTER_S = 2
_WATCH_INTERVAL_S = 0.5  # how soon the work of a client that has gone is stopped


class Telemetry(Collector):
    """Counted as it happens, or asked for when somebody looks.

    Args:
        servers: the state of each server.
    """

    def __init__(self, servers: Callable[[], Sequence[ServerStatus]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "r1reward_requests_total", "Requests by route and HTTP status", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "r1reward_request_seconds",
            "Time from admission to answer",
            ("route",),
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.judgements = Counter("r1reward_judgements_total", "Judgements made", registry=self.registry)
        self.unparsable = Counter(
            "r1reward_unparsable_total", "Judgements without a readable verdict", registry=self.registry
        )
        self.in_progress = Gauge("r1reward_requests_in_progress", "Requests being worked on", registry=self.registry)
        self._servers = servers
        self.cohorts: Mapping[str, int] = {}  # `CohortBuffer.counts`
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        servers = self._servers()
        states = GaugeMetricFamily("r1reward_servers", "vLLM servers by state", labels=["state"])
        for state, count in Tally(server.state for server in servers).items():
            states.add_metric([state], count)
        failures = CounterMetricFamily(
            "r1reward_server_failures", "Requests and health checks that a server did not answer", labels=["server"]
        )
        restarts = CounterMetricFamily(
            "r1reward_server_restarts", "Starts of a server but for the first", labels=["server"]
        )
        for server in servers:
            failures.add_metric([server.name], server.failures)
            restarts.add_metric([server.name], server.restarts)
        cohorts = CounterMetricFamily(
            "r1reward_cohorts", "Samples of other trainers, their cohorts, and what got no reward", labels=["what"]
        )
        for what, count in self.cohorts.items():
            cohorts.add_metric([what], count)
        yield from (states, failures, restarts, cohorts)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The model and the event loop that it belongs to; whether a server can answer now, and the state of each."""

    model: AnyModel
    loop: EventLoopThread
    ready: Callable[[], bool] = lambda: True
    servers: Callable[[], Sequence[ServerStatus]] = lambda: ()


class RewardService:
    """The routes' work: requests in, answers out."""

    def __init__(
        self, backend: Backend, limits: Limits, *, concurrency: int, policy: PromptPolicy | None = None
    ) -> None:
        self.backend, self.limits, self.policy = backend, limits, policy
        self.admission = Admission(concurrency)
        self.telemetry = Telemetry(backend.servers)
        self.telemetry.in_progress.set_function(lambda: self.admission.in_progress)

    async def compare(self, request: wire.CompareRequest) -> dict[str, Any]:
        item = self._checked(request)
        pair = (request.responses[0], request.responses[1])
        votes, policy = request.as_votes(), self.policy
        work = compare(self.backend.model, item, pair, votes, seed=request.seed, policy=policy)
        answer = wire.compare_answer(await self._elsewhere(work))
        self._count(len(answer["judgements"]), answer["unparsable"])
        return answer

    async def rank(self, request: wire.RankRequest) -> dict[str, Any]:
        item = self._checked(request)
        work = rank(
            self.backend.model,
            item,
            request.responses,
            request.as_votes(),
            schedule=request.schedule,
            rounds=request.rounds,
            budget=request.budget,
            seed=request.seed,
        )
        answer = wire.rank_answer(await self._elsewhere(work))
        self._count(answer["calls"], answer["unparsable"])
        return answer

    def _checked(self, request: wire.CompareRequest | wire.RankRequest) -> Item:
        if self.policy is not None:
            self.policy.check_orders(request.both_orders, "both_orders false")
        return wire.checked_item(request, self.limits)

    async def score(self, request: wire.RankRequest) -> dict[str, Any]:
        return {"rewards": (await self.rank(request))["rewards"]}

    async def batch(self, request: wire.BatchRequest) -> dict[str, Any]:
        """All tasks side by side; one that is refused or fails is an {"error": ...} in its place."""
        if len(request.tasks) > self.limits.batch:
            raise RefusedError(f"{len(request.tasks)} tasks, at most {self.limits.batch} are taken in one batch")
        asked = [one for task in request.tasks for one in (task.compare, task.rank) if one is not None]
        wire.check_judgements(asked, self.limits)
        return {"results": await asyncio.gather(*map(self._task, request.tasks))}

    async def _task(self, task: wire.BatchTask) -> dict[str, Any]:
        try:
            if task.compare is not None and task.rank is None:
                return await self.compare(task.compare)
            if task.rank is not None and task.compare is None:
                return await self.rank(task.rank)
            raise RefusedError("a task is either {compare: ...} or {rank: ...}")
        except (ValueError, ModelUnavailableError, NoServerError) as error:
            return {"error": str(error)}

    async def admitted(self, request: Request, route: str, work: Coroutine[Any, Any, Any]) -> Response:
        """Do the work if there is room for it, and as long as the client is there; its result as JSON."""
        began = time.monotonic()
        try:
            with self.admission.enter():
                response: Response = JSONResponse(await _while_connected(request, work))
        except FullError:
            work.close()
            tree = {"error": f"{self.admission.limit} requests are in progress: come again"}
            response = JSONResponse(tree, status_code=429, headers={"Retry-After": str(RETRY_AFTER_S)})
        except (ValueError, ModelUnavailableError, NoServerError) as error:
            response = _error_response(error)
        self.telemetry.requests.labels(route, response.status_code).inc()
        self.telemetry.seconds.labels(route).observe(time.monotonic() - began)
        return response

    async def _elsewhere(self, work: Coroutine[Any, Any, T]) -> T:
        """On the model's loop; cancelling the request cancels the work."""
        return await asyncio.wrap_future(self.backend.loop.submit(work))

    def _count(self, judgements: int, unparsable: int) -> None:
        self.telemetry.judgements.inc(judgements)
        self.telemetry.unparsable.inc(unparsable)


def build_app(service: RewardService, *, token: str | None) -> FastAPI:
    """The application.

    Args:
        token: what every request must carry; None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.admission.draining = True

    app = FastAPI(
        title="megatron_r1reward",
        description="A multimodal reward model, generative, pointwise or scalar: compare, rank, score.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from the network; /openapi.json is the description
        redoc_url=None,
    )
    _add_errors(app)
    _add_judging_routes(app, service)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        well = service.backend.ready() and not service.admission.draining
        return JSONResponse({"status": "ready" if well else "not ready"}, status_code=200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.telemetry.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    # The last one added is asked first.
    app.add_middleware(BodyLimit, limit=service.limits.body_bytes)
    if token is not None:
        app.add_middleware(ServiceGuard, token=token)
    return app


def _add_judging_routes(app: FastAPI, service: RewardService) -> None:
    @app.post("/v1/compare", response_model=wire.CompareAnswer)
    async def compare_route(body: wire.CompareRequest, request: Request) -> Response:
        return await service.admitted(request, "compare", service.compare(body))

    @app.post("/v1/rank", response_model=wire.RankAnswer)
    async def rank_route(body: wire.RankRequest, request: Request) -> Response:
        return await service.admitted(request, "rank", service.rank(body))

    @app.post("/v1/score", response_model=wire.ScoreAnswer)
    async def score_route(body: wire.RankRequest, request: Request) -> Response:
        return await service.admitted(request, "score", service.score(body))

    @app.post("/v1/batch", response_model=wire.BatchAnswer)
    async def batch_route(body: wire.BatchRequest, request: Request) -> Response:
        return await service.admitted(request, "batch", service.batch(body))


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_WATCH_INTERVAL_S))[0]:
            if await request.is_disconnected():
                raise RefusedError("the client has gone")
        return task.result()
    finally:
        task.cancel()


def _error_response(error: Exception) -> Response:
    """4xx for what the caller can change, 503 for what only time can."""
    if isinstance(error, ModelUnavailableError | NoServerError):
        log.warning("no answer: %s", error)
        return JSONResponse({"error": "the model does not answer: come again"}, 503, {"Retry-After": "10"})
    return JSONResponse({"error": str(error)}, status_code=422)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return JSONResponse({"error": f"{where}: {first['msg']}"}, status_code=422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
