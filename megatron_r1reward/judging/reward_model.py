"""The reward model in Python: `RewardModel.from_pretrained(FOLDER)` or `.connect(URL)`, then compare, rank, score.

    from megatron_r1reward import RewardModel

    with RewardModel.from_pretrained("runs/demo/rl/export") as model:
        comparison = model.compare("What is in the picture?", ("A cat.", "A dog."), images=["cat.png"], votes=5)
        print(comparison.verdict, comparison.probability, comparison.reasoning)
        ranking = model.rank("What is in the picture?", ["A cat.", "A dog.", "A car."], images=["cat.png"])
        print(ranking.order, ranking.rewards)

Every method has an asynchronous twin (`acompare`, ...). All requests are made on an event loop of the model's own, so
both kinds work in a program, in a notebook and inside another event loop.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.judging.ask import AskOptions, ImageInput, Item, ModelClient
from megatron_r1reward.judging.compare import Comparison, Votes, compare
from megatron_r1reward.judging.pointwise import RatingClient
from megatron_r1reward.judging.rank import Ranking, Schedule, rank
from megatron_r1reward.judging.rewards import AnyModel
from megatron_r1reward.judging.scalar import ScalarClient
from megatron_r1reward.judging.served import asked_by, kind_said, policy_of, serve_folder
from megatron_r1reward.model_folder.prompt_policy import Kind, PromptPolicy
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.servers.command import sees_gpu

T = TypeVar("T")


class RewardModel:
    """A trained reward model, generative, pointwise or scalar; close it, or use it as a context manager."""

    def __init__(
        self, model: AnyModel, loop: EventLoopThread, cleanup: ExitStack, policy: PromptPolicy | None = None
    ) -> None:
        """Use `connect` or `from_pretrained`. `model` belongs to `loop`; `cleanup` is closed with this object."""
        self._model, self._loop, self._cleanup = model, loop, cleanup
        self.policy = policy  # what the model's folder says about how it is asked; None: nothing known

    @classmethod
    def connect(
        cls,
        url: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        options: AskOptions | None = None,
        folder: str | Path | None = None,
    ) -> RewardModel:
        """Use running servers: vLLM's, or any OpenAI-compatible endpoint, that serve the same model. A scalar reward
        model's are vLLM's, and `folder` says what they serve.

        Args:
            model: its name there; None: the first that /v1/models lists.
            folder: the model's, or "org/name@revision" that has been fetched: what it says about its prompt and its
                orders holds. None: the published prompt.

        Raises:
            ValueError: `folder` is not there, or what it says cannot be read.
        """
        policy = None if folder is None else policy_of(folder)
        with ExitStack() as stack:
            loop = EventLoopThread("reward-model")
            stack.callback(loop.close)
            urls = [url] if isinstance(url, str) else list(url)
            asked = asked_by(policy, options or AskOptions())
            kinds: dict[Kind, type[ModelClient | RatingClient | ScalarClient]] = {
                "generative": ModelClient,
                "pointwise": RatingClient,
                "scalar": ScalarClient,
            }
            client = kinds[kind_said(policy)](urls, model=model, api_key=api_key, options=asked)
            stack.callback(lambda: loop.run(client.aclose()))
            return cls(client, loop, stack.pop_all(), policy)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        servers: int = 1,
        log_dir: str | Path | None = None,
        options: AskOptions | None = None,
        report: Callable[[str], None] | None = None,
        **section: Any,
    ) -> RewardModel:
        """Serve a Hugging Face folder on this machine; the servers end with the model, or with this process.

        Args:
            folder: or "org/name@revision", once `r1reward hub fetch` has brought it here.
            servers: how many; each gets `tensor_parallel_size` GPUs (on a CPU `num_threads` threads).
            log_dir: the servers' logs; None: a temporary folder.
            report: takes lines about the start, which lasts from seconds to minutes.
            section: keys of the run file's [rollout] section, e.g. max_model_len=16384, tensor_parallel_size=2.

        Raises:
            ValueError: `folder` is no model folder, or a key is unknown.
            ServerError: a server did not start; the message ends with its last lines.
        """
        # vLLM on a CPU would take 92 % of the machine's memory for its cache.
        settings = ServerSection(**({} if sees_gpu() else {"kv_cache_bytes": 1 << 30}) | section)
        with ExitStack() as stack:
            logs = Path(log_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="reward-model-")))
            asked = options or AskOptions()
            served = serve_folder(
                local_folder(folder), settings, count=servers, log_dir=logs, options=asked, report=report
            )
            stack.callback(served.close)
            return cls(served, served.group.loop, stack.pop_all(), served.policy)

    async def acompare(
        self,
        question: str,
        responses: tuple[str, str],
        images: Sequence[ImageInput] = (),
        *,
        votes: int | Votes = 1,
        seed: int = 0,
    ) -> Comparison:
        """See `compare`."""
        return await self._elsewhere(self._compare(question, responses, images, votes, seed))

    def compare(
        self,
        question: str,
        responses: tuple[str, str],
        images: Sequence[ImageInput] = (),
        *,
        votes: int | Votes = 1,
        seed: int = 0,
    ) -> Comparison:
        """Which response is better?

        Args:
            images: paths, bytes, PIL images or data URLs.
            votes: judgements in each of the two orders (1: greedy), or `Votes` for everything else. A pointwise reward
                model rates each response so many times; a scalar one has one number for each.

        Raises:
            ValueError: not two responses, an image that cannot be read, the model refuses the request (too long), or
                several votes of a scalar reward model.
            ModelUnavailableError: no server answered.
        """
        return self._loop.run(self._compare(question, responses, images, votes, seed))

    async def arank(
        self,
        question: str,
        candidates: Sequence[str],
        images: Sequence[ImageInput] = (),
        *,
        votes: int | Votes = 1,
        schedule: Schedule = "swiss",
        rounds: int | None = None,
        budget: int | None = None,
        seed: int = 0,
    ) -> Ranking:
        """See `rank`."""
        work = self._rank(question, candidates, images, votes, schedule, rounds, budget, seed)
        return await self._elsewhere(work)

    def rank(
        self,
        question: str,
        candidates: Sequence[str],
        images: Sequence[ImageInput] = (),
        *,
        votes: int | Votes = 1,
        schedule: Schedule = "swiss",
        rounds: int | None = None,
        budget: int | None = None,
        seed: int = 0,
    ) -> Ranking:
        """Order candidates from best to worst, with a reward and its uncertainty for each.

        Args:
            schedule: which pairs are compared; docs/use.md has the measured table.
            budget: judgements at most.

        Raises:
            ValueError: fewer than two candidates, a budget below one comparison; of a scalar or pointwise reward
                model: none, or rounds or a budget; else as `compare`.
            ModelUnavailableError: no server answered.
        """
        return self._loop.run(self._rank(question, candidates, images, votes, schedule, rounds, budget, seed))

    async def ascore(
        self, question: str, responses: Sequence[str], images: Sequence[ImageInput] = (), **options: Any
    ) -> tuple[float, ...]:
        """See `score`."""
        return (await self.arank(question, responses, images, **options)).rewards

    def score(
        self, question: str, responses: Sequence[str], images: Sequence[ImageInput] = (), **options: Any
    ) -> tuple[float, ...]:
        """One number per response: its mean probability of winning against the others, in (0, 1); of a scalar reward
        model the value of its head, any number, of a pointwise one its mean rating, also for a single response.

        Args:
            options: as for `rank`.
        """
        return self.rank(question, responses, images, **options).rewards

    def rank_many(
        self,
        items: Iterable[tuple[str, Sequence[str], Sequence[ImageInput]]],
        *,
        progress: bool = True,
        concurrency: int = 16,
        **options: Any,
    ) -> list[Ranking | Exception]:
        """Rank the candidates of many items, (question, candidates, images) each, side by side.

        Args:
            progress: a progress bar, in a terminal or a notebook.
            concurrency: items in flight.
            options: as for `rank`.

        Returns:
            In the order of `items`: a ranking, or the error that one item ended with; the others are not lost.
        """
        return self._loop.run(self._rank_many(list(items), progress, concurrency, options))

    async def _rank_many(
        self,
        items: Sequence[tuple[str, Sequence[str], Sequence[ImageInput]]],
        progress: bool,
        concurrency: int,
        options: dict[str, Any],
    ) -> list[Ranking | Exception]:
        from tqdm.auto import tqdm

        slots = asyncio.Semaphore(concurrency)
        bar = tqdm(total=len(items), desc="ranking", disable=not progress)

        async def one(question: str, candidates: Sequence[str], images: Sequence[ImageInput]) -> Ranking | Exception:
            async with slots:
                try:
                    return await self._rank(question, candidates, images, **_RANK_DEFAULTS | options)
                except (ValueError, RuntimeError) as error:
                    return error
                finally:
                    bar.update()

        with bar:
            return await asyncio.gather(*(one(*item) for item in items))

    async def _compare(
        self, question: str, responses: Sequence[str], images: Sequence[ImageInput], votes: int | Votes, seed: int
    ) -> Comparison:
        if isinstance(responses, str) or len(responses) != 2:
            raise ValueError(f"compare takes two responses, got {responses!r:.200}: for more use rank")
        pair = (responses[0], responses[1])
        item, chosen = Item.of(question, images), self.checked(votes)
        return await compare(self._model, item, pair, chosen, seed=seed, policy=self.policy)

    async def _rank(
        self,
        question: str,
        candidates: Sequence[str],
        images: Sequence[ImageInput],
        votes: int | Votes,
        schedule: Schedule,
        rounds: int | None,
        budget: int | None,
        seed: int,
    ) -> Ranking:
        return await rank(
            self._model,
            Item.of(question, images),
            candidates,
            self.checked(votes),
            schedule=schedule,
            rounds=rounds,
            budget=budget,
            seed=seed,
        )

    def checked(self, votes: int | Votes) -> Votes:
        """How to ask; ValueError when the model's folder says that it is asked otherwise."""
        chosen = votes if isinstance(votes, Votes) else Votes(samples=votes)
        if self.policy is not None:
            self.policy.check_orders(chosen.both_orders, "one order")
        return chosen

    @property
    def model(self) -> AnyModel:
        """What makes the requests; belongs to the model's own loop, see `run`."""
        return self._model

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the model's own loop and wait for it."""
        return self._loop.run(work)

    async def _elsewhere(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that runs on the model's own loop; cancelling the wait cancels the work."""
        return await asyncio.wrap_future(self._loop.submit(work))

    def close(self) -> None:
        """Close connections and stop the servers that were started here. Safe to call twice."""
        self._cleanup.close()

    def __enter__(self) -> RewardModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_RANK_DEFAULTS: dict[str, Any] = {
    "votes": 1,
    "schedule": "swiss",
    "rounds": None,
    "budget": None,
    "seed": 0,
}
