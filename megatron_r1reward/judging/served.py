"""A reward model on servers that are supervised here: a server that dies or hangs is mended, its requests are not lost.

judge --router--> the server that knows the item, or the least busy --ModelClient--> judgements
    reward, rate --router--> the same --ScalarClient, RatingClient--> the reward of one response
             failure: told to the supervisor (which quarantines, probes, restarts), asked again elsewhere
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1reward.cluster.visible_gpus import VARIABLE, count_gpus
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.stage_data import SCALAR_TEMPLATE
from megatron_r1reward.hub_name import local_folder
from megatron_r1reward.judging.ask import (
    AskOptions,
    Endpoint,
    Item,
    Judgement,
    ModelClient,
    ModelUnavailableError,
    Order,
)
from megatron_r1reward.judging.pointwise import RatingClient
from megatron_r1reward.judging.rewards import Reward
from megatron_r1reward.judging.scalar import ScalarClient
from megatron_r1reward.model_folder.beside_weights import check_files, end_of_turn
from megatron_r1reward.model_folder.prompt_policy import FILE, Kind, PromptPolicy, read_policy
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.reward.readers import policy_reader
from megatron_r1reward.servers.command import sees_gpu
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.member import Member
from megatron_r1reward.servers.process import Report, VllmServer, start_servers

T = TypeVar("T")
ClientT = TypeVar("ClientT", bound=Endpoint)
SERVED_NAME = "reward-model"
_ATTEMPTS = 8  # with pauses of up to 10 s: outlasts the notice of a death; waiting for a restart is no attempt


class _WithdrawnError(ModelUnavailableError):
    """Its server was taken out of service meanwhile."""


class Served(Generic[ClientT]):
    """A model behind a group of servers, on the group's event loop; closing it stops the servers that are its own."""

    client: ClassVar[type[Endpoint]]

    def __init__(
        self,
        group: ServerGroup,
        *,
        model: str | None = SERVED_NAME,
        options: AskOptions,
        policy: PromptPolicy | None = None,
    ) -> None:
        self.group, self.policy = group, policy
        self._model = model
        self._options = replace(options, retries=0)  # tried again here, where the other servers are known
        self._clients: dict[tuple[str, str | None], ClientT] = {}

    async def _asked(self, item: Item, ask: Callable[[ClientT], Coroutine[Any, Any, T]]) -> T:
        """The result of `ask` at a server that is well.

        Raises:
            NoServerError: every server has been given up.
        """
        failed: set[Member] = set()
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(ModelUnavailableError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.25, max=10.0),
            reraise=True,
        )
        async for attempt in attempts:
            with attempt:
                member = await self.group.router.acquire(item.key, frozenset(failed))
                try:
                    result = await _unless_withdrawn(member, ask(self._client(member)))
                except ModelUnavailableError as error:
                    failed.add(member)
                    if not isinstance(error, _WithdrawnError):  # the supervisor knows why it withdrew this one
                        self.group.supervisor.failed(member, str(error))
                    raise
                finally:
                    self.group.router.release(member)
                self.group.supervisor.succeeded(member)
                return result
        raise AssertionError("the last attempt raises")

    @property
    def ready_servers(self) -> int:
        return sum(member.state == "ready" for member in self.group.members)

    async def aclose(self) -> None:
        """Close connections; the servers stay until `close`."""
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()

    def close(self) -> None:
        """Close connections, end the servers that were started here, and the event loop."""
        self.group.loop.run(self.aclose())
        self.group.close()

    def _client(self, member: Member) -> ClientT:
        """A client for the member's present address, which a restart may change."""
        address = (member.url, member.bearer_token)
        if address not in self._clients:
            made = self.client([member.url], model=self._model, api_key=member.bearer_token, options=self._options)
            self._clients[address] = cast(ClientT, made)
        return self._clients[address]


class ServedModel(Served[ModelClient]):
    """One that judges pairs."""

    client = ModelClient

    async def judge(
        self, item: Item, responses: tuple[str, str], *, order: Order, n: int, temperature: float, seed: int
    ) -> list[Judgement]:
        """See `ModelClient.judge`; raises NoServerError as well."""
        return await self._asked(
            item,
            lambda client: client.judge(item, responses, order=order, n=n, temperature=temperature, seed=seed),
        )


class ServedScalar(Served[ScalarClient]):
    """One that scores single responses."""

    client = ScalarClient

    async def reward(self, item: Item, response: str) -> Reward:
        """See `ScalarClient.reward`; raises NoServerError as well."""
        return await self._asked(item, lambda client: client.reward(item, response))


class ServedPointwise(Served[RatingClient]):
    """One that rates single responses."""

    client = RatingClient

    async def rate(self, item: Item, response: str, *, n: int, temperature: float, seed: int) -> Reward:
        """See `RatingClient.rate`; raises NoServerError as well."""
        return await self._asked(
            item, lambda client: client.rate(item, response, n=n, temperature=temperature, seed=seed)
        )


AnyServed = ServedModel | ServedScalar | ServedPointwise


def serve_folder(
    folder: Path, section: ServerSection, *, count: int, log_dir: Path, options: AskOptions, report: Report | None
) -> AnyServed:
    """Serve a Hugging Face folder on this machine by `count` servers; returns when all have completed a request.

    The folder is asked as it says itself: its template takes the place of that of `options`.

    Raises:
        ValueError: `folder` is no model folder, a file in it is torn, or `gpu_ids` are too few.
        ServerError: a server did not start.
    """
    policy = policy_of(folder)
    check_files(folder)
    size = section.tensor_parallel_size
    gpu_ids = section.gpu_ids
    if not gpu_ids and count > 1 and sees_gpu():  # each of them would take the first ones
        gpu_ids = tuple(range(count_gpus(os.environ)))
    if gpu_ids and len(gpu_ids) < count * size:
        raise ValueError(
            f"{count} servers of tensor_parallel_size {size} need {count * size} GPUs, and there are "
            f"{len(gpu_ids)} (gpu_ids, or {VARIABLE}): start fewer servers"
        )
    servers = [
        VllmServer(
            section,
            model_path=folder,
            log_path=log_dir / f"reward-model-{index}.log",
            served_name=SERVED_NAME,
            pixels=None if policy is None else policy.pixels,
            gpu_ids=gpu_ids[index * size : (index + 1) * size],
        )
        for index in range(count)
    ]
    try:
        start_servers(servers, report)
        group = ServerGroup(
            section, name="reward-model", servers=servers, served_name=SERVED_NAME, scalar=is_scalar(policy)
        )
    except BaseException:
        for server in servers:
            server.close()
        raise
    return served_by(group, options=options, policy=policy)


def served_by(
    group: ServerGroup, *, model: str | None = SERVED_NAME, options: AskOptions, policy: PromptPolicy | None
) -> AnyServed:
    """The model of these servers, of the kind that its folder says, asked as that says; see `asked_by`."""
    kinds: dict[Kind, type[AnyServed]] = {
        "generative": ServedModel,
        "pointwise": ServedPointwise,
        "scalar": ServedScalar,
    }
    return kinds[kind_said(policy)](group, model=model, options=asked_by(policy, options), policy=policy)


def kind_said(policy: PromptPolicy | None) -> Kind:
    """Of the model; a folder that says nothing compares."""
    return "generative" if policy is None else policy.kind


def is_scalar(policy: PromptPolicy | None) -> bool:
    """Whether servers need the route of a scalar head; the other kinds answer chats."""
    return kind_said(policy) == "scalar"


def policy_of(folder: str | Path) -> PromptPolicy | None:
    """What a model's folder says about how it is asked; None where it says nothing. That of a scalar head without the
    file is asked as `r1reward rm` trains.

    Raises:
        ValueError: there is no such folder, or what it says cannot be read, or is of another kind of model.
    """
    here = local_folder(folder)
    if not (here / "config.json").is_file():
        raise ValueError(f"model {here} has no config.json: give a Hugging Face model folder, or a server's URL")
    policy = read_policy(here)
    scalar = is_scalar_folder(here)
    if scalar and policy is None:
        policy = PromptPolicy(kind="scalar", template=SCALAR_TEMPLATE, orders="any")
    if policy is not None and scalar != is_scalar(policy):
        raise ValueError(
            f'model {here}: {FILE} says kind "{policy.kind}", and config.json the other one: take both from one export'
        )
    if policy is not None and scalar:
        return policy.model_copy(update={"end_of_turn": end_of_turn(here)})
    return policy.of_weights(model_identity(here)) if policy is not None and policy.calibration else policy


async def _unless_withdrawn(member: Member, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` at a server that may be found hanging meanwhile.

    Raises:
        _WithdrawnError: it was taken out of service; this request is asked elsewhere.
    """
    call = asyncio.ensure_future(work)
    member.in_flight.add(call)
    try:
        await asyncio.wait({call})
    finally:
        member.in_flight.discard(call)
        call.cancel()  # does nothing to a finished one
    if call.cancelled():
        raise _WithdrawnError(f"{member.url} was taken out of service during the request")
    return call.result()


def asked_by(policy: PromptPolicy | None, options: AskOptions) -> AskOptions:
    """`options` with the template and the parser of the model's folder, where that says some.

    Raises:
        ValueError: both have a prompt of their own; or the parser is code, and `options` do not trust it.
    """
    if policy is None:
        return options
    if options.prompt.turns:
        raise ValueError(f"the model's {FILE} has the prompt that it was trained with: leave out the other one")
    read = policy_reader(policy, trusted=options.trust_parser)
    prompt = replace(options.prompt, template=policy.template, read=read or options.prompt.read)
    if policy.end_of_turn is not None:
        options = replace(options, end_of_turn=policy.end_of_turn)
    # Which token holds the verdict is known of the published form only.
    return replace(options, prompt=prompt, log_probs=options.log_probs and read is None)


def endpoints(
    section: ServerSection,
    urls: Sequence[str],
    *,
    options: AskOptions,
    model: str | None,
    policy: PromptPolicy | None = None,
) -> AnyServed:
    """Supervised use of running vLLM servers: those that fail are left out until they complete a request again.

    Args:
        policy: of the folder that they serve; None: it is not known, and the published prompt is used.

    Raises:
        ServerError: one refuses the token, or does not complete a request in time.
    """
    scalar = is_scalar(policy)
    group = ServerGroup(section, name="reward-model", urls=urls, served_name=model, scalar=scalar)
    try:
        group.wait_until_ready()
    except BaseException:
        group.close()
        raise
    return served_by(group, model=model, options=options, policy=policy)
