"""Many prompts over several servers, with exact accounting: every sample is returned, set aside or explained."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from megatron_r1reward.config.schema import SamplingSection, ServerSection
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.client import PolicyTokenizer, RequestRefusedError, RolloutClient, ServerUnavailableError
from megatron_r1reward.rollout.server import Report, VllmServer, start_servers
from megatron_r1reward.rollout.weights import WeightPusher, WeightPushError
from megatron_r1reward.rollout.weights_gloo import GlooWeightPusher
from megatron_r1reward.types import Prompt, Rollout, TensorMeta

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)

SERVED_NAME = "policy"
_BACKOFF_BASE_S = 0.5
_BACKOFF_CAP_S = 10.0


@dataclass(frozen=True, kw_only=True)
class FailedPrompt:
    """A prompt without rollouts, and why."""

    prompt: Prompt
    reason: str


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """Every prompt is in `failed`, or has exactly n samples in `rollouts` and `quarantined` together."""

    rollouts: tuple[Rollout, ...]  # in the order of the prompts, then of the samples
    failed: tuple[FailedPrompt, ...]
    quarantined: tuple[Rollout, ...]  # hold a banned token id: not fit for training


class LeastOutstanding:
    """Picks, among servers in service, the one with the fewest requests in flight."""

    def __init__(self, count: int) -> None:
        self.outstanding = [0] * count
        self.in_service = [True] * count

    def pick(self, avoid: set[int]) -> int | None:
        """Index of the best server outside `avoid`; if all are to be avoided, of the best one; None if none is left."""
        usable = [index for index, up in enumerate(self.in_service) if up]
        preferred = [index for index in usable if index not in avoid] or usable
        return min(preferred, key=self.outstanding.__getitem__, default=None)

    @contextmanager
    def hold(self, index: int) -> Iterator[None]:
        """Counts one request as in flight on server `index`."""
        self.outstanding[index] += 1
        try:
            yield
        finally:
            self.outstanding[index] -= 1

    def retire(self, index: int) -> None:
        self.in_service[index] = False


class RolloutPool:
    """A set of servers of one policy. One `generate` at a time; weights may be pushed from another thread meanwhile.

    Args:
        section: limits (concurrency, time-outs, retries).
        urls: the servers. All serve the model as `SERVED_NAME`.
        servers: those of them that belong to the pool, in the order of `urls`; closed with it.
        pusher: how weights get there; None for a pool whose weights never change.
    """

    def __init__(
        self,
        section: ServerSection,
        *,
        urls: Sequence[str],
        tokenizer: PolicyTokenizer,
        banned_ids: Iterable[int],
        servers: Sequence[VllmServer] = (),
        pusher: WeightPusher | None = None,
    ) -> None:
        if not urls:
            raise ValueError("a rollout pool needs at least one server: set rollout.urls or rollout.count")
        assert not servers or len(servers) == len(urls)
        self._section = section
        self._banned_ids = frozenset(banned_ids)
        self._clients = [
            RolloutClient(url, model=SERVED_NAME, tokenizer=tokenizer, banned_ids=self._banned_ids) for url in urls
        ]
        self.urls = tuple(urls)
        self._servers = tuple(servers)
        self._pusher = pusher
        self._router = LeastOutstanding(len(urls))
        self._runner = asyncio.Runner()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int = 1,
        seed: int,
        progress: Progress | None = None,
    ) -> GenerateResult:
        """Sample `n` responses per prompt; a prompt whose server fails is retried on another.

        Args:
            seed: with the prompt's id it determines the tokens, whichever server samples them.

        Raises:
            ValueError: n is impossible with these settings.
            ServerError: all servers of the pool have died.
            WeightPushError: an earlier push failed, so the servers are paused.
        """
        if n > self._section.max_num_seqs:
            raise ValueError(
                f"{n} samples per prompt exceed max_num_seqs {self._section.max_num_seqs}: raise the latter"
            )
        if n > 1 and sampling.temperature == 0:
            raise ValueError(
                f"temperature 0 would draw {n} equal samples: set temperature > 0 or one sample per prompt"
            )
        if self._pusher is not None and self._pusher.broken is not None:
            raise WeightPushError(f"the servers are paused after a failed weight push: {self._pusher.broken}")
        result = self._runner.run(self._generate(prompts, sampling, n, seed, progress))
        if prompts and not any(self._router.in_service):
            self._servers[0].check_alive()
        return result

    def push_weights(
        self, metas: Sequence[TensorMeta], named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """Replace the weights of all servers; see `WeightPusher.push`. Raises WeightPushError, servers then paused."""
        if self._pusher is None:
            raise ValueError("this pool was opened without a weight transport: open it with weight_transfer='gloo'")
        self._pusher.push(metas, named_tensors, version=version)

    def close(self) -> None:
        """Close connections and stop the servers that the pool started. Safe to call twice."""
        for client in self._clients:
            self._runner.run(client.aclose())
        self._clients = []
        self._runner.close()
        if self._pusher is not None:
            self._pusher.close()
            self._pusher = None
        for server in self._servers:
            server.stop()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSection, n: int, seed: int, progress: Progress | None
    ) -> GenerateResult:
        slots = asyncio.Semaphore(self._section.max_concurrency * len(self._clients))
        done = 0

        async def outcome_of(prompt: Prompt) -> list[Rollout] | FailedPrompt:
            nonlocal done
            async with slots:
                outcome = await self._sample(prompt, sampling, n, seed)
            done += 1
            if progress is not None:
                progress(done, len(prompts))
            return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome_of(prompt)) for prompt in prompts]
        outcomes = [task.result() for task in tasks]
        rollouts = [rollout for outcome in outcomes if not isinstance(outcome, FailedPrompt) for rollout in outcome]
        return GenerateResult(
            rollouts=tuple(rollout for rollout in rollouts if self._banned_ids.isdisjoint(rollout.token_ids)),
            failed=tuple(outcome for outcome in outcomes if isinstance(outcome, FailedPrompt)),
            quarantined=tuple(rollout for rollout in rollouts if not self._banned_ids.isdisjoint(rollout.token_ids)),
        )

    async def _sample(
        self, prompt: Prompt, sampling: SamplingSection, n: int, seed: int
    ) -> list[Rollout] | FailedPrompt:
        """All samples of one prompt from one server, or the reason why there are none."""
        tried: set[int] = set()
        reason = "no server is in service"
        for attempt in range(self._section.retries + 1):
            if attempt > 0:
                await asyncio.sleep(_backoff_s(attempt))
            index = self._router.pick(avoid=tried)
            if index is None:
                break
            tried.add(index)
            client = self._clients[index]
            try:
                async with asyncio.timeout(self._section.request_timeout_s):
                    with self._router.hold(index):
                        return await client.generate(prompt, sampling, n=n, seed=seed)
            except RequestRefusedError as refusal:
                return FailedPrompt(prompt=prompt, reason=str(refusal))
            except TimeoutError:
                reason = f"{client.url} gave no answer within {self._section.request_timeout_s:g} s"
            except ServerUnavailableError as error:
                reason = str(error)
            if self._servers and not self._servers[index].alive:
                self._router.retire(index)
        return FailedPrompt(prompt=prompt, reason=f"not sampled after retries; the last error: {reason}")


def _backoff_s(attempt: int) -> float:
    """Exponential with full jitter, so that the prompts of a dead server do not all come back at once."""
    return random.uniform(0, min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2**attempt))


def open_rollout_pool(
    section: ServerSection,
    *,
    model_path: Path,
    tokenizer: PolicyTokenizer,
    log_dir: Path,
    media_root: Path | None = None,
    pixels: tuple[int, int] | None = None,
    weight_transfer: Literal["gloo"] | None = "gloo",
    sender_host: str = "127.0.0.1",
    progress: Report | None = None,
) -> RolloutPool:
    """Use the servers at `section.urls`, or start `section.count` of them; returns when all are ready.

    Args:
        model_path: HF folder of the policy.
        log_dir: server i writes to rollout-<i>.log in it.
        media_root: folder above all image paths; pixels: (min, max) of the image processor (see `server_command`).
        weight_transfer: None for a policy that does not change (evaluation).
        sender_host: the address under which the servers reach this process for weights.

    Raises:
        ServerError: a server did not start.
    """
    policy_path = section.model_path or model_path
    servers = [
        VllmServer(
            section,
            model_path=policy_path,
            log_path=log_dir / f"rollout-{index}.log",
            served_name=SERVED_NAME,
            weight_transfer=weight_transfer,
            media_root=media_root,
            pixels=pixels,
        )
        for index in range(0 if section.urls else section.count)
    ]
    urls = section.urls or tuple(server.url for server in servers)
    pool = RolloutPool(
        section,
        urls=urls,
        tokenizer=tokenizer,
        banned_ids=banned_token_ids(policy_path),
        servers=servers,
        pusher=None if weight_transfer is None else GlooWeightPusher(urls, host=sender_host),
    )
    try:
        start_servers(servers, progress)
    except BaseException:
        pool.close()
        raise
    return pool
