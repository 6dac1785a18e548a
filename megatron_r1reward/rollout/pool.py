"""Many prompts over several servers, in the background if wished, with exact accounting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1reward.config.schema import SamplingSection, ServerSection
from megatron_r1reward.monitor.timers import BusyClock
from megatron_r1reward.rollout import accounting
from megatron_r1reward.rollout.accounting import Accounting, FailedPrompt
from megatron_r1reward.rollout.client import (
    PolicyTokenizer,
    RequestRefusedError,
    RolloutClient,
    ServerUnavailableError,
    UnfinishedError,
)
from megatron_r1reward.servers.build import SERVED_NAME
from megatron_r1reward.servers.group import NoServerError, ServerGroup
from megatron_r1reward.servers.member import Member, Server, ServerError, ServerStatus
from megatron_r1reward.servers.sleep import Colocation, SleepLevel
from megatron_r1reward.types import Prompt, Rollout, TensorMeta
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.fleet import PoolPusher
from megatron_r1reward.weight_sync.protocol import Transport

Progress = Callable[[int, int], None]  # (prompts done, prompts in all); called on the pool's thread
# (place of the prompt, its samples without the quarantined ones; none: it failed); called on the pool's thread
Arrived = Callable[[int, Sequence[Rollout]], None]


class StaleWeightsError(ServerUnavailableError):
    """The answer was sampled under weights that are not current: the server was restarted behind our back."""


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """Every prompt is in `failed`, or has exactly n samples in `rollouts` and `quarantined` together."""

    rollouts: tuple[Rollout, ...]  # in the order of the prompts, then of the samples
    failed: tuple[FailedPrompt, ...]
    quarantined: tuple[Rollout, ...]  # hold a banned token id: not fit for training
    accounting: Accounting


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    sampling: SamplingSection
    n: int
    seed: int
    counts: Counter[str]  # of the `submit` call it belongs to


class RolloutPool:
    """Servers of one policy. Methods may be called from any thread, several `submit` may be under way at once, and
    weights may be pushed meanwhile: requests in flight then go on with the new weights (`Rollout.weight_spans`).

    Args:
        section: limits (concurrency, time-outs, retries).
        urls: the servers, unless `servers` are given. All serve the model as `SERVED_NAME`.
        servers: started and ready; they belong to the pool: supervised, and closed with it.
        transport: how weights get there; None for a pool whose weights never change.
        media_roots: folders that images must be in; None: no limit.
        status_file: see `ServerGroup`.
        sleep_level: of servers on the trainer's devices, which `sleep` and `push_weights` put to sleep and wake; None:
            they have devices of their own, and `sleep` does nothing.
    """

    def __init__(
        self,
        section: ServerSection,
        *,
        urls: Sequence[str] = (),
        tokenizer: PolicyTokenizer,
        banned_ids: Iterable[int],
        servers: Sequence[Server] = (),
        transport: Transport | None = None,
        media_roots: Sequence[Path] | None = None,
        status_file: Path | None = None,
        sleep_level: SleepLevel | None = None,
    ) -> None:
        if not urls and not servers:
            raise ValueError("a rollout pool needs at least one server: set rollout.urls or rollout.count")
        self._section = section
        self._tokenizer = tokenizer
        self._banned_ids = frozenset(banned_ids)
        self._media_roots = media_roots
        self._clients: dict[tuple[str, str | None], RolloutClient] = {}
        self.total = Accounting()  # of all `generate` calls so far
        self._pusher: PoolPusher | None = None
        self.group = ServerGroup(
            section,
            name="rollout",
            urls=urls,
            servers=servers,
            served_name=SERVED_NAME,
            admit=self._admit,
            status_file=status_file,
        )
        self.clocks = {member.name: BusyClock() for member in self.group.members}  # of requests in flight
        self._colocation = None if sleep_level is None else Colocation(self.group, sleep_level)
        try:
            if transport is not None:
                self._pusher = PoolPusher(transport, section, self.group, wakes=sleep_level is not None)
            for member in self.group.members:
                self._client(member)  # complains about impossible settings now
        except BaseException:
            self.group.close()
            raise

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.group.members)

    def status(self) -> list[ServerStatus]:
        """The state of each server."""
        return self.group.status()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int = 1,
        seed: int,
        progress: Progress | None = None,
    ) -> GenerateResult:
        """`submit` and wait. An interrupted wait cancels the requests."""
        future = self.submit(prompts, sampling, n=n, seed=seed, progress=progress)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int = 1,
        seed: int,
        progress: Progress | None = None,
        arrived: Arrived | None = None,
    ) -> Future[GenerateResult]:
        """Start sampling `n` responses per prompt and return at once; cancel the future to give up.

        A prompt whose server fails is asked again on another one; while no server is in service it waits.

        Args:
            seed: with the prompt's id it determines the tokens, whichever server samples them.
            arrived: hears of every prompt as soon as its samples are there, while others are still sampled.

        Raises (the first two at once, the last by the future):
            ValueError: n is impossible with these settings, or two prompts have one id.
            WeightPushError: an earlier push failed, so the servers are paused.
            PhaseError: the servers are asleep.
            ServerError: all servers of the pool have been given up.
        """
        if n > self._section.max_num_seqs:
            raise ValueError(
                f"{n} samples per prompt exceed max_num_seqs {self._section.max_num_seqs}: raise the latter"
            )
        if n > 1 and sampling.temperature == 0:
            raise ValueError(
                f"temperature 0 would draw {n} equal samples: set temperature > 0 or one sample per prompt"
            )
        if len({prompt.id for prompt in prompts}) < len(prompts):
            twice = next(name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1)
            raise ValueError(f"prompt id {twice!r} occurs twice in one batch: its samples would be equal")
        if self._pusher is not None and self._pusher.broken is not None:
            raise WeightPushError(f"the servers are paused after a failed weight push: {self._pusher.broken}")
        if self._colocation is None:
            return self.group.loop.submit(self._generate(prompts, sampling, n, seed, progress, arrived))
        end = self._colocation.machine.begin_generation()
        future = self.group.loop.submit(_then(end, self._generate(prompts, sampling, n, seed, progress, arrived)))
        future.add_done_callback(lambda _: end())  # cancelled before it began
        return future

    def push_weights(
        self, metas: Sequence[TensorMeta], named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """Replace the weights of all servers; see `PoolPusher.push`. Raises WeightPushError, servers then paused."""
        if self._pusher is None:
            raise ValueError("this pool was opened without a weight transport: set weight_transfer")
        with self._colocation.waking() if self._colocation is not None else nullcontext():
            self._pusher.push(metas, named_tensors, version=version)

    def sleep(self) -> None:
        """Colocated servers free their memory for the trainer until the next push; others are not touched.

        Raises:
            PhaseError, ServerError: see `Colocation.sleep`.
        """
        if self._colocation is not None:
            self._colocation.sleep()

    def sleep_metrics(self) -> dict[str, float]:
        """Memory that was free while the servers slept; nothing for servers on devices of their own."""
        return {} if self._colocation is None else self._colocation.metrics()

    def close(self) -> None:
        """Close connections and stop the servers that belong to the pool. Safe to call twice."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            self.group.loop.run(client.aclose())
        self.group.close()
        if self._pusher is not None:
            self._pusher.close()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _client(self, member: Member) -> RolloutClient:
        """A client for the member's present address."""
        address = (member.url, member.bearer_token)
        if address not in self._clients:
            self._clients[address] = RolloutClient(
                member.url,
                model=SERVED_NAME,
                tokenizer=self._tokenizer,
                banned_ids=self._banned_ids,
                token=member.bearer_token,
                media_roots=self._media_roots,
            )
        return self._clients[address]

    async def _admit(self, member: Member) -> None:
        if self._pusher is not None:
            await self._pusher.admit(member)

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        n: int,
        seed: int,
        progress: Progress | None,
        arrived: Arrived | None,
    ) -> GenerateResult:
        request = SampleRequest(sampling=sampling, n=n, seed=seed, counts=Counter())
        done = 0

        async def outcome_of(place: int, prompt: Prompt) -> list[Rollout] | FailedPrompt:
            nonlocal done
            outcome = await self._sample(prompt, request)
            done += 1
            if arrived is not None:
                arrived(place, [] if isinstance(outcome, FailedPrompt) else list(filter(self._is_usable, outcome)))
            if progress is not None:
                progress(done, len(prompts))
            return outcome

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(outcome_of(place, prompt)) for place, prompt in enumerate(prompts)]
        except* NoServerError as errors:
            raise ServerError(str(errors.exceptions[0])) from None
        return self._account(prompts, n, [task.result() for task in tasks], request.counts)

    def _account(
        self, prompts: Sequence[Prompt], n: int, outcomes: Sequence[list[Rollout] | FailedPrompt], counts: Counter[str]
    ) -> GenerateResult:
        samples = [rollout for outcome in outcomes if not isinstance(outcome, FailedPrompt) for rollout in outcome]
        failed = tuple(outcome for outcome in outcomes if isinstance(outcome, FailedPrompt))
        usable = tuple(filter(self._is_usable, samples))
        account = Accounting(
            asked=len(prompts),
            answered=len(outcomes) - len(failed),
            failed=len(failed),
            samples=len(samples),
            quarantined=len(samples) - len(usable),
            **counts,
        )
        accounting.check(prompts, n, samples, failed, account)
        self.total += account
        return GenerateResult(
            rollouts=usable,
            failed=failed,
            quarantined=tuple(rollout for rollout in samples if not self._is_usable(rollout)),
            accounting=account,
        )

    def _is_usable(self, rollout: Rollout) -> bool:
        return self._banned_ids.isdisjoint(rollout.token_ids)

    async def _sample(self, prompt: Prompt, request: SampleRequest) -> list[Rollout] | FailedPrompt:
        """All samples of one prompt from one server, or the reason why there are none."""
        section = self._section
        failed: set[Member] = set()
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(ServerUnavailableError),
            stop=stop_after_attempt(section.retries + 1),
            # Full jitter, so that the prompts of a dead server do not all come back at once.
            wait=wait_random_exponential(multiplier=section.backoff_s, max=section.backoff_max_s),
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    request.counts["retried"] += attempt.retry_state.attempt_number == 2
                    return await self._attempt(prompt, request, failed)
        except RequestRefusedError as refusal:
            return FailedPrompt(prompt=prompt, reason=str(refusal))
        except ServerUnavailableError as error:
            return FailedPrompt(prompt=prompt, reason=f"not sampled after retries; the last error: {error}")
        raise AssertionError("the last attempt raises")

    async def _attempt(self, prompt: Prompt, request: SampleRequest, failed: set[Member]) -> list[Rollout]:
        """One request to one server; a failure is added to `failed` and reported to the supervisor."""
        member = await self.group.router.acquire(prompt.preference_id, frozenset(failed))
        request.counts["attempts"] += 1
        try:
            with self.clocks[member.name].busy():
                rollouts = await self._ask(member, prompt, request)
        except ServerUnavailableError as error:
            failed.add(member)
            request.counts["unfinished"] += isinstance(error, UnfinishedError)
            if isinstance(error, StaleWeightsError):
                self.group.supervisor.quarantine(member, str(error))
            self.group.supervisor.failed(member, str(error))
            raise
        finally:
            self.group.router.release(member)
        self.group.supervisor.succeeded(member)
        return rollouts

    async def _ask(self, member: Member, prompt: Prompt, request: SampleRequest) -> list[Rollout]:
        url, current = member.url, self._pusher.current() if self._pusher is not None else None
        call = asyncio.create_task(
            self._client(member).generate(prompt, request.sampling, n=request.n, seed=request.seed)
        )
        member.in_flight.add(call)
        try:
            done, _ = await asyncio.wait({call}, timeout=self._section.request_timeout_s)
        finally:
            member.in_flight.discard(call)
            call.cancel()  # does nothing to a finished one
        if not done:
            raise ServerUnavailableError(f"{url} gave no answer within {self._section.request_timeout_s:g} s")
        if call.cancelled():
            request.counts["withdrawn"] += 1
            raise ServerUnavailableError(f"{url} was taken out of service during the request")
        rollouts = call.result()
        if current is not None and (wrong := current.wrong(rollouts)) is not None:
            request.counts["stale"] += 1
            raise StaleWeightsError(f"{url} answered with weight version {wrong}, which is not current there")
        return rollouts


async def _then(end: Callable[[], None], work: Coroutine[Any, Any, GenerateResult]) -> GenerateResult:
    """`work`, and `end` before anybody sees its result."""
    try:
        return await work
    finally:
        end()
