"""Real servers that are killed, stopped, cut off and lied about. Nothing is lost, and the weights stay exact."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from fault_proxy import ProxiedServer, garbage, internal_error, no_fault
from reference import PATIENCE_S, SERVER, Reference, requests_running
from running_service import Running
from service_load import CLIENTS, ask_all, mixed_requests, same
from tenacity import Retrying, stop_after_delay, wait_fixed
from waiting import wait_until

from megatron_r1reward.config.schema import JudgeSection, SamplingSection
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.served import ServedModel
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.keeper import shared_memory_of
from megatron_r1reward.servers.member import Member
from megatron_r1reward.servers.process import VllmServer, start_servers
from megatron_r1reward.serving.service import Backend
from megatron_r1reward.types import Prompt
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.senders import GlooTransport

pytestmark = pytest.mark.e2e
SECTION = SERVER.model_copy(
    update={
        "health_interval_s": 0.3,
        "health_failures": 2,
        "request_failures": 2,
        "backoff_s": 0.1,
        "push_timeout_s": 60.0,
        "weight_bucket_bytes": 100_000,
        "max_restarts": 5,
    }
)
LONG = SamplingSection(max_tokens=160)
TOLERANCE = 1e-3
READY_S = 1200.0


CLOSED_ROUTES = (
    ("POST", "/pause"),
    ("POST", "/update_weights"),
    ("POST", "/collective_rpc"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("POST", "/inference/v1/generate"),
)


@dataclass(kw_only=True)
class Setup:
    servers: list[ProxiedServer]
    pool: RolloutPool
    transport: GlooTransport
    judges: ServerGroup
    judge_server: VllmServer
    reference: Reference  # weights that are not the checkpoint's
    prompts: list[Prompt]
    version: int = 0
    traces: set[Path] = field(default_factory=set)  # shared memory and scratch folders of all lives of the servers

    def push(self) -> None:
        self.version += 1
        self.pool.push_weights(*self.reference.weights(), version=self.version)

    def check(self, result: GenerateResult, n: int) -> None:
        """Every prompt came back, once, from the weights of this version."""
        account = result.accounting
        print(f"accounting: {account}")
        assert (account.asked, account.answered, account.failed) == (len(self.prompts), len(self.prompts), 0)
        assert (account.samples, account.quarantined) == (n * len(self.prompts), 0)
        keys = [(rollout.prompt.id, rollout.sample_index) for rollout in result.rollouts]
        assert keys == [(prompt.id, index) for prompt in self.prompts for index in range(n)]
        assert {span.version for r in result.rollouts for span in r.weight_spans} == {self.version}
        assert max(self.reference.error(rollout) for rollout in result.rollouts[:: len(keys) // 6]) < TOLERANCE

    def all_ready(self) -> None:
        """Wait until every server is in service, then see that each serves the current weights."""
        wait_until(lambda: {row.state for row in self.pool.status()} == {"ready"}, READY_S)
        for server in [*self.servers, self.judge_server]:
            assert server.pid is not None
            assert server._scratch is not None
            self.traces |= {server._scratch.path, *shared_memory_of(server.pid)}
        assert {row.weight_version for row in self.pool.status()} == {self.version}
        for member in self.pool.group.members:
            url, headers = f"{member.url}/weight_info", bearer(member.bearer_token)
            answer = httpx.get(url, headers=headers, timeout=PATIENCE_S)
            assert answer.json() == {"weight_version": str(self.version)}
        served = [row.requests for row in self.pool.status()]
        # One prompt per preference id and more prompts than affinity binds: both servers get some.
        fresh = [Prompt(**{**vars(p), "preference_id": f"{p.id}-{time.monotonic_ns()}"}) for p in self.prompts]
        result = self.pool.generate(fresh, SamplingSection(max_tokens=8), seed=1)
        assert all(row.requests > before for row, before in zip(self.pool.status(), served, strict=True))
        assert max(map(self.reference.error, result.rollouts)) < TOLERANCE


@pytest.fixture(scope="module")
def setup(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, image_paths: tuple[str, ...]) -> Iterator[Setup]:
    logs = tmp_path_factory.mktemp("fault-logs")
    options = {"model_path": tiny_folder, "media_root": Path(image_paths[0]).parent}
    servers = [
        ProxiedServer(SECTION, **options, log_path=logs / f"{i}.log", served_name=SERVED_NAME, weight_transfer="gloo")
        for i in range(2)
    ]
    judge_server = VllmServer(SECTION, model_path=tiny_folder, log_path=logs / "judge.log", served_name="judge")
    children = set(psutil.Process().children(recursive=True))
    start_servers([*servers, judge_server])
    reference = Reference(tiny_folder).redrawn(seed=3)
    transport = GlooTransport(timeout_s=60)
    pool = RolloutPool(
        SECTION,
        tokenizer=reference.tokenizer,
        banned_ids=banned_token_ids(tiny_folder),
        servers=servers,
        transport=transport,
        media_roots=[Path(image_paths[0]).parent],
    )
    judges = ServerGroup(SECTION, name="judge", servers=[judge_server], served_name="judge")
    made = Setup(
        servers=servers,
        pool=pool,
        transport=transport,
        judges=judges,
        judge_server=judge_server,
        reference=reference,
        prompts=[reference.prompt(f"{i}", f"Which digit? {i}", image_paths[i % 3]) for i in range(12)],
    )
    made.push()
    yield made
    print(f"all accounting: {pool.total}")
    pool.close()
    judges.close()
    assert pool.total.asked == pool.total.answered, "a prompt was lost"
    assert not set(psutil.Process().children(recursive=True)) - children, "processes are left behind"
    assert not [path for path in made.traces if path.exists()], "shared memory or temporary files are left behind"


@pytest.fixture(autouse=True)
def healthy(setup: Setup) -> Iterator[None]:
    """Every test begins and ends with all servers in service."""
    setup.all_ready()
    yield
    setup.all_ready()


def generate_and_break(setup: Setup, number: int, break_it: Callable[[], object]) -> GenerateResult:
    """`break_it` is called while server `number` is sampling, and stopped (SIGSTOP), so that it does not finish before.

    Who wants it to go on has to continue it.
    """
    pid = setup.servers[number].pid
    assert pid is not None
    for _ in range(10):
        generation = setup.pool.submit(setup.prompts, LONG, n=4, seed=setup.version)
        wait_until(lambda: requests_running(setup.pool, number) > 0 or generation.done())  # noqa: B023
        os.killpg(pid, signal.SIGSTOP)
        time.sleep(0.2)  # for answers that are on their way
        if setup.pool.status()[number].in_flight > 0:
            break_it()
            return generation.result(READY_S)
        os.killpg(pid, signal.SIGCONT)
        generation.result(READY_S)
    raise AssertionError("it always had answered everything by then")


def test_killed_while_generating_and_its_port_taken(setup: Setup) -> None:
    server = setup.servers[0]
    old_port, pid = server.port, server.pid
    assert pid is not None
    with socket.socket() as intruder:
        intruder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def kill_and_take_port() -> None:
            os.kill(pid, signal.SIGKILL)
            go_on(pid)
            wait_until(port_is_taken)

        def port_is_taken() -> bool:
            try:
                intruder.bind(("127.0.0.1", old_port))
                intruder.listen()
            except OSError:
                return False
            return True

        result = generate_and_break(setup, 0, kill_and_take_port)
        setup.check(result, 4)
        assert result.accounting.retried > 0
        wait_until(lambda: setup.pool.status()[0].state == "ready", READY_S)
        assert server.port != old_port


def go_on(group: int) -> None:
    """Continue what is left of a stopped process group."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)


def test_hanging(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: the process is there and its port accepts connections."""
    # Only here: a busy machine lets a healthy server look like a hanging one.
    section = SECTION.model_copy(update={"health_timeout_s": 4.0})
    monkeypatch.setattr(setup.pool.group.supervisor, "_section", section)
    restarts = setup.pool.status()[0].restarts
    result = generate_and_break(setup, 0, lambda: None)
    setup.check(result, 4)
    assert result.accounting.withdrawn > 0, "taken back long before the time-out of a request"
    wait_until(lambda: setup.pool.status()[0].restarts > restarts)


@pytest.mark.parametrize("fault", [internal_error, garbage])
def test_failing_for_a_while(setup: Setup, fault) -> None:
    """Quarantined and back without a restart."""
    proxy = setup.servers[1].proxy
    before = setup.pool.status()[1]

    async def fails_to_generate(request):
        return await fault(request) if "generate" in request.url.path else None

    proxy.fault = fails_to_generate
    generation = setup.pool.submit(setup.prompts, LONG, n=4, seed=77)
    wait_until(lambda: setup.pool.status()[1].failures >= before.failures + SECTION.request_failures)
    proxy.fault = no_fault
    result = generation.result(READY_S)
    setup.check(result, 4)
    assert result.accounting.retried > 0
    wait_until(lambda: setup.pool.status()[1].state == "ready", READY_S)
    assert setup.pool.status()[1].restarts == before.restarts


def is_paused(member: Member) -> bool:
    """What the server says; the proxy's idle connection to it may have been closed, so it is asked until it answers."""
    for attempt in Retrying(stop=stop_after_delay(PATIENCE_S), wait=wait_fixed(0.2), reraise=True):
        with attempt:
            url, headers = f"{member.url}/is_paused", bearer(member.bearer_token)
            answer = httpx.get(url, headers=headers, timeout=PATIENCE_S).raise_for_status()
    return answer.json()["is_paused"]


def test_push_whose_tensors_end_early(setup: Setup) -> None:
    """The servers stay paused, and the next complete push repairs them; nobody is restarted."""
    restarts = [row.restarts for row in setup.pool.status()]
    metas, tensors = setup.reference.weights()
    with pytest.raises(WeightPushError, match=f"end before {metas[20].name}"):
        setup.pool.push_weights(metas, islice(tensors, 20), version=setup.version + 1)
    for member in setup.pool.group.members:
        assert is_paused(member)
    with pytest.raises(WeightPushError, match="paused after a failed weight push"):
        setup.pool.generate(setup.prompts, LONG, seed=0)
    setup.reference.redrawn(seed=setup.version + 10)
    setup.push()
    setup.check(setup.pool.generate(setup.prompts, LONG, n=2, seed=5), 2)
    assert [row.restarts for row in setup.pool.status()] == restarts


def test_push_that_loses_a_server_in_the_middle(setup: Setup) -> None:
    """The survivor serves the new weights at once; the other one gets them after its restart."""
    setup.reference.redrawn(seed=setup.version + 20)
    metas, tensors = setup.reference.weights()
    pid = setup.servers[1].pid
    assert pid is not None

    def killing() -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(tensors):
            if index == 20:
                os.killpg(pid, signal.SIGKILL)
            yield item

    setup.version += 1
    setup.pool.push_weights(metas, killing(), version=setup.version)
    setup.check(setup.pool.generate(setup.prompts, LONG, n=2, seed=6), 2)


def test_push_that_arrives_damaged(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte changes on the way; the workers refuse, and get the weights a second time."""
    setup.reference.redrawn(seed=setup.version + 30)
    original, damaged = setup.transport._broadcast, []

    def damage(tensor: torch.Tensor):
        if not damaged:
            tensor = tensor.clone()
            tensor[100] ^= 1
            damaged.append(True)
        return original(tensor)

    monkeypatch.setattr(setup.transport, "_broadcast", damage)
    setup.push()
    assert damaged
    setup.check(setup.pool.generate(setup.prompts, LONG, n=2, seed=7), 2)


def test_judge_is_killed(setup: Setup) -> None:
    """A random model is made to choose, so it gives verdicts. Dead it gives none, quickly; then it is asked again."""
    section = JudgeSection(retries=1, backoff_s=0.05, backoff_max_s=0.1, breaker_failures=2, model="judge")
    judge = ConsistencyJudge(section, setup.judges.endpoints)
    server = setup.judge_server
    asked = itertools.count()

    def ask() -> tuple[int, int]:
        """(verdicts, questions that were not tried) for six new questions."""
        verdicts = asyncio.run(judge.judge_many([(f"case {next(asked)}", 1) for _ in range(6)]))
        known, calls, not_tried = 6 - verdicts.count("unknown"), judge.counts["calls"], judge.counts["not_tried"]
        print(f"accounting: 6 questions = {known} answered in {calls} calls + {not_tried} not tried")
        return known, not_tried

    served = requests_of(server)
    assert ask() == (6, 0)
    wait_until(lambda: requests_of(server) == served + 6)
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)
    assert ask()[0] == 0
    assert ask() == (0, 5), "one trial question"
    wait_until(lambda: setup.judges.status()[0].restarts == 1)
    wait_until(lambda: setup.judges.status()[0].state == "ready", READY_S)
    assert ask() == (6, 0)


def test_the_reward_service_loses_no_request_and_answers_as_before(setup: Setup, image_paths: tuple[str, ...]) -> None:
    """64 clients at once, over two servers of which one loses its engine process: every answer is the one of a quiet
    service."""
    group = setup.pool.group
    form = {"structured_outputs": {"regex": "<think>ok</think><answer>[12]</answer>"}}
    asked = AskOptions(max_tokens=48, request_extra={"extra_body": form})
    served = ServedModel(group, model=SERVED_NAME, options=asked)
    roots = (Path(image_paths[0]).parent,)
    service = Running(backend=Backend(model=served, loop=group.loop), image_roots=roots, concurrency=CLIENTS)
    try:
        requests = mixed_requests([Path(path).name for path in image_paths])
        quiet = ask_all(service.url, requests, at_once=2)
        busiest: list[Member] = []

        def kill(done: int) -> None:
            if done == CLIENTS // 8:
                member = max(group.members, key=lambda member: member.outstanding)
                assert member.outstanding > 0
                api = psutil.Process(setup.servers[group.members.index(member)].pid)
                (engine,) = [p for p in api.children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
                engine.kill()
                busiest.append(member)

        loud = ask_all(service.url, requests, at_once=CLIENTS, after=kill)
        assert [answer.status_code for answer in (*quiet, *loud)] == [200] * 2 * CLIENTS
        assert all(same(one.json(), other.json()) for one, other in zip(quiet, loud, strict=True))
        wait_until(lambda: busiest[0].restarts > 0 and busiest[0].failures > 0, READY_S)
    finally:
        service.stop()
        group.loop.run(served.aclose())


def requests_of(server: VllmServer) -> int:
    text = httpx.get(f"{server.url}/metrics", headers=bearer(server.token), timeout=PATIENCE_S).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
    return sum(int(float(line.split()[-1])) for line in lines)


def test_developer_routes_are_closed(setup: Setup) -> None:
    """Without the token nothing but /health answers; a server without weight transfer has no such routes."""
    with httpx.Client(timeout=PATIENCE_S) as http:
        for server in [*setup.servers, setup.judge_server]:
            for method, route in CLOSED_ROUTES:
                assert http.request(method, server.url + route, json={}).status_code == 401, route
                assert http.request(method, server.url + route, json={}, headers=bearer("guess")).status_code == 401
            assert http.get(f"{server.url}/health").status_code == 200
        judge = setup.judge_server
        assert http.post(f"{judge.url}/pause", headers=bearer(judge.token)).status_code == 404
