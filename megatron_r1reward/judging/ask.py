"""Asking a reward model which of two responses is better: a question, images and two texts in, judgements out.

    Item + two responses --preference_messages--> chat request, n samples --> Judgement per sample

The model is behind any OpenAI-compatible endpoint: a vLLM server of this package, of your own, or a provider's.
Images travel inside the request, so servers need no access to our disk. Requests about the same question and images go
to the same server while it is well, because that server has their prefix and image embeddings in its caches.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import math
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar, Union

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice
from PIL import Image
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1reward.judging.judge_prompt import JudgePrompt
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label, exchange_images

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

ImageInput = Union[str, Path, bytes, "PilImage"]
MAX_PIXELS = 100_000_000  # above it a small file may be a large picture; vLLM's own loader warns at 89 million
T = TypeVar("T")
Order = Literal["12", "21"]  # the responses as given, or exchanged
ORDERS: Final[tuple[Order, Order]] = ("12", "21")
_NO_ROUTE = " (another kind of model? name the folder that it serves: --prompt-of, or folder=)"
_TOP_LOG_PROBS = 5  # "1" and "2" are among the likeliest tokens of an answer, or neither matters


def image_url(image: ImageInput, *, max_pixels: int = MAX_PIXELS) -> str:
    """The image as a base64 data URL; the bytes of a file stay as they are, so the server decodes what we were given.

    Raises:
        ValueError: it cannot be read, is no image, is larger than `max_pixels`, or is a network address.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return _data_url(buffer.getvalue(), "image of the program", max_pixels)
    if isinstance(image, bytes):
        return _data_url(image, f"image of {len(image)} bytes", max_pixels)
    text = str(image)
    if text.startswith("data:"):
        return _data_url(_decode(text), "data URL", max_pixels)
    if "://" in text:
        raise ValueError(f"image {text[:200]!r} is a network address: load it and give the bytes, or a file's path")
    try:
        return _data_url(Path(text).read_bytes(), f"image {text[:200]}", max_pixels)
    except OSError as error:
        raise ValueError(f"image {text[:200]!r} cannot be read: {error.strerror or error}") from error


def _decode(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"data URL {url[:60]!r} is not 'data:<type>;base64,<data>'")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data URL {url[:60]!r} is not base64: {error}") from error


def _data_url(data: bytes, name: str, max_pixels: int) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                width, height, mime = *picture.size, picture.get_format_mimetype()
                if width * height > max_pixels:
                    raise ValueError(f"{name} has {width} x {height} pixels, more than {max_pixels}: make it smaller")
                picture.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels: {error}") from error
    except (OSError, SyntaxError) as error:  # PIL reports damaged PNG chunks as SyntaxError
        raise ValueError(f"{name} is not a picture that can be read: {error}") from error
    if mime is None:
        raise ValueError(f"{name} has a format without a MIME type: convert it to PNG, JPEG or WebP")
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


class ModelRefusedError(ValueError):
    """The model cannot judge this item (4xx: too long, unreadable image); asking again would not help."""


class ModelUnavailableError(RuntimeError):
    """No server gave a usable answer, retries included."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What responses are given to: a question about images (none: a question in words)."""

    question: str
    images: tuple[str, ...] = ()  # data URLs, in the order in which the model sees them
    # How many of `images`, the last ones, stand in each response as given, where its text has `<image>`
    response_images: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, question: str, images: Sequence[ImageInput] = (), response_images: tuple[int, int] = (0, 0)) -> Item:
        """Raises ValueError for an image that cannot be read; see `image_url`."""
        return cls(question=question, images=tuple(map(image_url, images)), response_images=response_images)

    @property
    def key(self) -> str:
        """Content hash of question and images, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        inside = map(str, self.response_images) if any(self.response_images) else ()
        for part in (self.question, *self.images, *inside):
            digest.update(hashlib.blake2b(part.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def alone(self, place: int) -> Item:
        """What response `place`, 0 or 1, is given to, as the first response: without the images of the other one."""
        if not any(self.response_images):
            return self
        images, (inside, other) = self.shown(ORDERS[place])
        return replace(self, images=images[: len(images) - other], response_images=(inside, 0))

    def shown(self, order: Order) -> tuple[tuple[str, ...], tuple[int, int]]:
        """`images` and `response_images` where the responses stand in `order`."""
        if order == "12":
            return self.images, self.response_images
        return exchange_images(self.images, self.response_images), self.response_images[::-1]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One sample of the model about one pair in one order. `choice` and `p_first` speak of the caller's order."""

    order: Order
    choice: Label | None  # the response that is better, as the caller numbered them; None: no verdict could be read
    # P(caller's first response) as the answer token's distribution has it, in [0, 1]; None: the endpoint does not tell
    p_first: float | None
    text: str
    reasoning: str
    tokens: int  # generated
    finish_reason: str
    consistent: bool | None = None  # whether the reasoning supports the verdict, as a judge says; None: it does not


class Asks(Protocol):
    """What `compare` and `rank` need of a model that compares: `ModelClient`, or recorded judgements."""

    async def judge(
        self, item: Item, responses: tuple[str, str], *, order: Order, n: int, temperature: float, seed: int
    ) -> list[Judgement]: ...


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How requests are made, whatever they ask."""

    max_tokens: int = 1024
    top_p: float = 1.0
    timeout_s: float = 600.0
    concurrency: int = 64  # requests in flight over all servers
    retries: int = 4  # further attempts, on another server where there is one
    backoff_s: float = 0.5  # first pause; doubles, with full jitter
    prompt: JudgePrompt = field(default_factory=JudgePrompt)
    end_of_turn: str = "<|im_end|>"  # of the response that a scalar reward model reads; its folder says it
    trust_parser: bool = False  # run the code that the model's folder carries for reading its verdicts
    log_probs: bool = True  # ask for those of the answer's token; some endpoints refuse that
    # Merged into every request, e.g. {"extra_body": {...}} for an endpoint with needs of its own; None removes a key.
    request_extra: Mapping[str, Any] = field(default_factory=dict)


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; the first error ends the others and is raised itself, not as a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return [task.result() for task in tasks]


class Endpoint:
    """One or several servers that serve the same weights.

    Belongs to the event loop that uses it first; close with `aclose`.

    Args:
        urls: roots of the servers, with or without /v1.
        model: its name there; None: the first that /v1/models lists.
        api_key: API key or bearer token; one for all servers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        options: AskOptions | None = None,
    ) -> None:
        if not urls:
            raise ValueError("no server: give the URL of at least one")
        self.options = options or AskOptions()
        roots = [url.rstrip("/") for url in urls]
        self._clients = [
            openai.AsyncOpenAI(
                base_url=root if root.endswith("/v1") else f"{root}/v1",
                api_key=api_key or "none",
                timeout=self.options.timeout_s,
                max_retries=0,  # retried here, on the next server
            )
            for root in roots
        ]
        self._model = model
        self._slots = asyncio.Semaphore(self.options.concurrency)

    async def aclose(self) -> None:
        for client in self._clients:
            await client.close()

    async def model_name(self) -> str:
        """The model's name at the endpoint.

        Raises:
            ModelUnavailableError: it has to be asked for, and no server lists its models.
        """
        if self._model is None:
            reasons = []
            for client in self._clients:
                try:
                    listing = await client.models.list()
                    self._model = listing.data[0].id
                    break
                except (openai.OpenAIError, IndexError, AttributeError, json.JSONDecodeError) as error:
                    reasons.append(f"{client.base_url}: {type(error).__name__}: {error}")
            else:
                raise ModelUnavailableError(f"no server says which model it serves: {'; '.join(reasons)}")
        return self._model

    async def _asked(self, item: Item, ask: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
        """The result of `ask` at the server that knows the item if it is well, else at the ones after it in turn."""
        first = int(item.key[:8], 16) % len(self._clients)
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(ModelUnavailableError),
            stop=stop_after_attempt(self.options.retries + 1),
            wait=wait_random_exponential(multiplier=self.options.backoff_s, max=10.0),
            reraise=True,
        )
        async with self._slots:
            async for attempt in attempts:
                with attempt:
                    place = first + attempt.retry_state.attempt_number - 1
                    return await self._attempt(self._clients[place % len(self._clients)], ask)
        raise AssertionError("the last attempt raises")

    async def _attempt(self, client: openai.AsyncOpenAI, ask: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
        try:
            return await ask(client)
        except (openai.RateLimitError, openai.APITimeoutError, openai.APIConnectionError) as error:
            raise ModelUnavailableError(f"{client.base_url}: {type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code != 408:
                said = f"{client.base_url} answered {error.status_code}: {error.message}"
                raise ModelRefusedError(said + (_NO_ROUTE if error.status_code == 404 else "")) from error
            raise ModelUnavailableError(f"{client.base_url} answered {error.status_code}: {error.message}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise ModelUnavailableError(f"{client.base_url}: {type(error).__name__}: {error}") from error


class ChatClient(Endpoint):
    """A model that answers chats; see `Endpoint`."""

    async def _sampled(
        self, item: Item, messages: list[dict[str, Any]], *, n: int, temperature: float, seed: int, **more: Any
    ) -> ChatCompletion:
        """`n` answers to a chat about `item`; raises as `ModelClient.judge`."""
        if n < 1 or (temperature == 0 and n > 1):
            raise ValueError(f"{n} samples at temperature {temperature:g}: greedy decoding has one; raise temperature")
        request = {
            "model": await self.model_name(),
            "messages": messages,
            "n": n,
            "temperature": temperature,
            "top_p": self.options.top_p,
            "max_tokens": self.options.max_tokens,
            "seed": seed,
            **more,
            **self.options.request_extra,
        }
        request = {key: value for key, value in request.items() if value is not None}

        async def ask(client: openai.AsyncOpenAI) -> ChatCompletion:
            completion: object = await client.chat.completions.create(**request)
            # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives as it is.
            if not isinstance(completion, ChatCompletion) or not completion.choices:
                raise ModelUnavailableError(f"{client.base_url}: not a chat completion: {str(completion)[:200]!r}")
            return completion

        completion = await self._asked(item, ask)
        if len(completion.choices) != n:
            raise ModelUnavailableError(f"asked for {n} samples, got {len(completion.choices)}")
        return completion


class ModelClient(ChatClient):
    """A generative model behind OpenAI-compatible servers; see `Endpoint`."""

    async def judge(
        self, item: Item, responses: tuple[str, str], *, order: Order, n: int, temperature: float, seed: int
    ) -> list[Judgement]:
        """Sample `n` judgements of `responses`, shown in `order`.

        Args:
            temperature: 0 is greedy, and then n must be 1.
            seed: samples of one request differ by their index; the same seed asks for the same samples again.

        Raises:
            ValueError: n and temperature do not go together.
            ModelRefusedError: the server says that this request is wrong.
            ModelUnavailableError: no server answered.
        """
        shown = responses if order == "12" else (responses[1], responses[0])
        images, inside = item.shown(order)
        messages = self.options.prompt.messages(item.question, shown, images, response_images=inside)
        more = {"logprobs": True, "top_logprobs": _TOP_LOG_PROBS} if self.options.log_probs else {}
        completion = await self._sampled(item, messages, n=n, temperature=temperature, seed=seed, **more)
        tokens = completion.usage.completion_tokens if completion.usage is not None else 0
        return [_judgement(choice, order, tokens // n, self.options.prompt) for choice in completion.choices]


def _judgement(choice: Choice, order: Order, mean_tokens: int, prompt: JudgePrompt) -> Judgement:
    text = choice.message.content or ""
    answer = prompt.read(text)
    tokens = choice.logprobs.content if choice.logprobs is not None else None
    p_shown_first = _answer_probability(tokens) if tokens and answer is not None else None
    swapped = order == "21"
    return Judgement(
        order=order,
        choice=None if answer is None else as_shown(answer, order),
        p_first=None if p_shown_first is None else 1.0 - p_shown_first if swapped else p_shown_first,
        text=text,
        reasoning=parse_response(text).reasoning,
        tokens=len(tokens) if tokens else mean_tokens,
        finish_reason=choice.finish_reason or "unknown",
    )


def as_shown(label: Label, order: Order) -> Label:
    """The place of a response in what was shown, from its place as given; and the other way about."""
    return label if order == "12" else 2 if label == 1 else 1


def _answer_probability(tokens: Sequence[Any]) -> float | None:
    """P("1") / (P("1") + P("2")) at the token that holds the digit of the first <answer>; None: no such token."""
    start = "".join(token.token for token in tokens).find("<answer>")
    if start < 0:
        return None
    place, digit_from = 0, start + len("<answer>")
    for token in tokens:
        place += len(token.token)
        if place > digit_from and token.token.strip() in ("1", "2"):
            shares = {"1": 0.0, "2": 0.0}
            for candidate in [token, *token.top_logprobs]:
                digit = candidate.token.strip()
                if digit in shares:
                    shares[digit] = max(shares[digit], math.exp(candidate.logprob))
            total = shares["1"] + shares["2"]
            return shares["1"] / total if total > 0 else None
    return None
