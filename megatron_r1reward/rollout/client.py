"""Asking one vLLM server for samples of one prompt: token ids and image paths in, rollouts out."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
from pydantic import BaseModel, ValidationError

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.network.server_api import tls
from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.types import Prompt, Rollout, WeightSpan

INITIAL_WEIGHTS = "default"  # what vLLM calls the weights it was started with: version 0
MAX_BANNED_IDS = 1024  # vLLM's GPU sampler has room for no more biased ids per request
IMAGE_TOKEN = "<|image_pad|>"
_BAN = -100.0
_NO_LOG_PROB = -9999.0  # vLLM's stand-in for NaN and -inf


class RequestRefusedError(RuntimeError):
    """The server cannot serve this prompt (4xx); asking again would not help."""


class ServerUnavailableError(RuntimeError):
    """No usable answer (connection lost, time-out, 5xx, not a rollout); another server may have one."""


class UnfinishedError(ServerUnavailableError):
    """A response was aborted or is empty: it is sampled again, on another server if there is one."""


class PolicyTokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


class _Span(BaseModel):
    version: str
    start: int
    end: int


class _TokenLogProb(BaseModel):
    token_id: int
    logprob: float


class _LogProbs(BaseModel):
    content: list[_TokenLogProb]


class _Choice(BaseModel):
    index: int
    finish_reason: str
    token_ids: list[int]
    logprobs: _LogProbs
    weight_versions: list[_Span]


class _GenerateResponse(BaseModel):
    choices: list[_Choice]


def sample_seed(seed: int, prompt_id: str) -> int:
    """The sampling seed of a prompt's first sample, in [0, 2**62); vLLM adds the sample's index for the others.

    It depends on nothing else, so a retry on another server, or a run with more samples, draws the same tokens.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class RolloutClient:
    """One server's generate endpoint.

    Args:
        url: of the server, e.g. http://127.0.0.1:8000.
        model: the name under which it serves the policy.
        tokenizer: the policy's.
        banned_ids: never sampled (see `banned.banned_token_ids`). The returned log-probabilities do not know about it.
        token: bearer token of the server.
        media_roots: folders that images must be in, symbolic links resolved; None: no limit (tests).
        connect_timeout_s: longest wait for a connection; how long a whole request may take is the caller's business.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        tokenizer: PolicyTokenizer,
        banned_ids: Iterable[int] = (),
        token: str | None = None,
        media_roots: Sequence[Path] | None = None,
        connect_timeout_s: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._model = model
        self._tokenizer = tokenizer
        self._image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._logit_bias = {str(token_id): _BAN for token_id in sorted(banned_ids)}
        if len(self._logit_bias) > MAX_BANNED_IDS:
            raise ValueError(
                f"{len(self._logit_bias)} banned token ids, but vLLM takes at most {MAX_BANNED_IDS}: "
                "check that vocab_size in config.json belongs to the tokenizer"
            )
        self._media_roots = None if media_roots is None else tuple(root.resolve() for root in media_roots)
        self._connections = _Connections(headers=bearer(token), connect_timeout_s=connect_timeout_s)

    async def generate(self, prompt: Prompt, sampling: SamplingSection, *, n: int, seed: int) -> list[Rollout]:
        """Sample `n` responses, in the order of their sample index.

        Same `seed`, prompt and weights: same tokens. `log_probs` are untempered and without the ban (the raw softmax),
        unless the server was started with `sampled_log_probs` (see `server_command`).

        Raises:
            RequestRefusedError: e.g. an image that cannot be read, or a prompt that is too long.
            ServerUnavailableError: worth another try.
        """
        self._check_images(prompt)
        body = self._request(prompt, sampling, n, seed)
        try:
            async with self._connections.take() as http:
                response = await http.post(f"{self.url}/inference/v1/generate", json=body)
        except httpx.TransportError as error:
            raise ServerUnavailableError(f"{self.url}: {type(error).__name__} {error}") from error
        if response.is_client_error and response.status_code not in (408, 429):
            raise RequestRefusedError(f"{self.url} answered {response.status_code}: {_error_message(response)}")
        if not response.is_success:
            raise ServerUnavailableError(f"{self.url} answered {response.status_code}: {_error_message(response)}")
        try:
            choices = _GenerateResponse.model_validate_json(response.content).choices
            choices.sort(key=lambda choice: choice.index)
            if [choice.index for choice in choices] != list(range(n)):
                raise ValueError(f"asked for {n} samples, got the indices {[choice.index for choice in choices]}")
            return [self._rollout(prompt, choice) for choice in choices]
        except (ValidationError, ValueError) as error:
            raise ServerUnavailableError(f"{self.url} did not answer with rollouts: {error}") from error

    async def aclose(self) -> None:
        await self._connections.aclose()

    def _check_images(self, prompt: Prompt) -> None:
        """Refuse what vLLM would accept without a word (too few images) or answer with a 500 (missing files)."""
        placeholders = prompt.token_ids.count(self._image_id)
        if placeholders != len(prompt.image_paths):
            raise RequestRefusedError(
                f"{placeholders} {IMAGE_TOKEN} in the prompt, but {len(prompt.image_paths)} images"
            )
        for path in map(Path, prompt.image_paths):
            if not path.is_absolute():
                raise RequestRefusedError(f"image {path} is a relative path, which means nothing to a server")
            if not path.is_file():
                raise RequestRefusedError(f"image {path} does not exist")
            if self._media_roots is not None and not any(map(path.resolve().is_relative_to, self._media_roots)):
                roots = ", ".join(map(str, self._media_roots))
                raise RequestRefusedError(f"image {path} is outside of the folders that images may come from ({roots})")

    def _request(self, prompt: Prompt, sampling: SamplingSection, n: int, seed: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "token_ids": prompt.token_ids,
            "content_parts": [{"type": "image_url", "url": Path(path).as_uri()} for path in prompt.image_paths],
            "sampling_params": {
                "n": n,
                "seed": sample_seed(seed, prompt.id),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": sampling.max_tokens,
                "logprobs": 0,  # of the sampled token only
                "logit_bias": self._logit_bias,
                "detokenize": False,
            },
        }

    def _rollout(self, prompt: Prompt, choice: _Choice) -> Rollout:
        if choice.finish_reason not in ("stop", "length"):  # not the policy's doing, so not for it to learn from
            raise UnfinishedError(f"sample {choice.index} ended with {choice.finish_reason!r}")
        if not choice.token_ids:
            raise UnfinishedError(f"sample {choice.index} has no token")
        content = choice.logprobs.content
        if [token.token_id for token in content] != choice.token_ids:
            raise ValueError(f"sample {choice.index}: the log-probabilities belong to other tokens than were returned")
        if any(token.logprob <= _NO_LOG_PROB for token in content):
            raise ValueError(f"sample {choice.index}: a sampled token has no finite log-probability")
        decode = self._tokenizer.decode
        body = choice.token_ids[:-1] if choice.finish_reason == "stop" else choice.token_ids  # without what ended it
        return Rollout(
            prompt=prompt,
            sample_index=choice.index,
            token_ids=tuple(choice.token_ids),
            log_probs=tuple(token.logprob for token in content),
            text=decode(choice.token_ids, skip_special_tokens=True),
            finish_reason=choice.finish_reason,
            weight_spans=tuple(_weight_span(span) for span in choice.weight_versions),
            special_tokens=decode(body, skip_special_tokens=False) != decode(body, skip_special_tokens=True),
        )


class _Connections:
    """Idle HTTP connections, one client each, last used first.

    httpx's own pool looks at all its connections at every request; with hundreds in flight that costs more CPU time
    than anything else here.
    """

    def __init__(self, *, headers: Mapping[str, str], connect_timeout_s: float) -> None:
        self._headers = dict(headers)
        self._timeout = httpx.Timeout(None, connect=connect_timeout_s)
        self._idle: list[httpx.AsyncClient] = []

    @asynccontextmanager
    async def take(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client nobody else uses meanwhile. Proxy variables are ignored: servers are machines of the cluster."""
        http = self._idle.pop() if self._idle else self._new()
        try:
            yield http
        finally:
            self._idle.append(http)

    def _new(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(headers=self._headers, timeout=self._timeout, verify=tls(), trust_env=False)

    async def aclose(self) -> None:
        for http in self._idle:
            await http.aclose()
        self._idle.clear()


def _weight_span(span: _Span) -> WeightSpan:
    version = 0 if span.version == INITIAL_WEIGHTS else int(span.version)
    return WeightSpan(version=version, start=span.start, end=span.end)


def _error_message(response: httpx.Response) -> str:
    """vLLM's own message where there is one, otherwise the start of the body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]
