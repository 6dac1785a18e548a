"""One OpenAI-compatible server that answers chat questions."""

from __future__ import annotations

from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Self

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

from megatron_r1reward.config.schema import JudgeSection


class UnusableReplyError(Exception):
    """The server answered, but not with what was asked for."""


class JudgeEndpoint:
    """A connection to one server; an async context manager that belongs to one event loop.

    Args:
        key: the API key or bearer token.
        models: names of the models that servers serve, by URL; filled when a server is asked for the first time, and
            kept by the caller for the next connection.
    """

    def __init__(self, section: JudgeSection, url: str, *, key: str, models: MutableMapping[str, str]) -> None:
        root = url.rstrip("/")
        self._url = root
        self._section = section
        self._models = models
        self._client = AsyncOpenAI(
            base_url=root if root.endswith("/v1") else f"{root}/v1",
            api_key=key,
            timeout=section.request_timeout_s,
            max_retries=0,  # the caller retries, on another server where there is one
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def reply(self, messages: list[dict[str, Any]]) -> str:
        """The model's reply to a chat.

        Raises:
            openai.OpenAIError: the server cannot be reached, is too slow, or refuses.
            json.JSONDecodeError, UnusableReplyError: the server's answer is not a chat completion with text.
        """
        completion: object = await self._client.chat.completions.create(
            model=await self._model_name(),
            messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
            temperature=self._section.temperature,
            max_tokens=self._section.max_tokens,
        )
        # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives here as it is.
        match completion:
            case ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content=str(text))), *_]):
                return text
            case _:
                raise UnusableReplyError(f"not a chat completion: {str(completion)[:200]!r}")

    async def _model_name(self) -> str:
        """`judge.model`, or the first model that the server lists; a server is asked once in its life."""
        if self._section.model is not None:
            return self._section.model
        # No lock: callers that start together may all ask, which is cheaper than queueing behind a server that hangs.
        if self._url not in self._models:
            match await self._client.get("/models", cast_to=object):
                case {"data": [{"id": str(name)}, *_]}:
                    self._models[self._url] = name
                case listing:
                    raise UnusableReplyError(f"not a list of models: {str(listing)[:200]!r}")
        return self._models[self._url]
