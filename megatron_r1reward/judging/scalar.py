"""A scalar reward model behind vLLM servers: one response in, one number out.

    question, images, response --chat that ends with the response's turn--> POST /classify --> value of the head

The tokens are those of its training (`stage_data.scored_examples`): the question's turn, the response and the token
that ends the turn, without what the chat template puts behind it, because the head reads the last token. (The trainer
tokenizes the response for itself: one that begins with a line break may differ by a token.)
"""

from __future__ import annotations

import math
from typing import Any

import openai

from megatron_r1reward.judging.ask import Endpoint, Item, ModelRefusedError, ModelUnavailableError
from megatron_r1reward.judging.rewards import Reward


class ScalarClient(Endpoint):
    """A scalar reward model behind servers of vLLM; see `Endpoint`."""

    async def reward(self, item: Item, response: str) -> Reward:
        """What the head says about `response`.

        Raises:
            ModelRefusedError: the response shows images, or the server says that this request is wrong (too long).
            ModelUnavailableError: no server answered with a number.
        """
        if any(item.response_images):
            raise ModelRefusedError("a response shows images, which a scalar reward model does not read")
        asked = self.options.prompt.messages(item.question, ("", ""), item.images)
        body = {
            "model": await self.model_name(),
            "messages": [*asked, {"role": "assistant", "content": response + self.options.end_of_turn}],
            "continue_final_message": True,  # nothing behind the end of the turn
            "add_generation_prompt": False,
            "use_activation": False,  # the value itself, not its sigmoid
        }

        async def ask(client: openai.AsyncOpenAI) -> Reward:
            route = str(client.base_url).removesuffix("/").removesuffix("/v1") + "/classify"
            return _reward(await client.post(route, cast_to=object, body=body), route)

        return await self._asked(item, ask)


def _reward(reply: Any, route: str) -> Reward:
    try:
        (value,) = reply["data"][0]["probs"]
        value, tokens = float(value), int(reply["usage"]["prompt_tokens"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelUnavailableError(f"{route}: not the reward of one response: {str(reply)[:200]!r}") from error
    if not math.isfinite(value):
        raise ModelUnavailableError(f"{route}: the reward is {value}")
    return Reward(value=value, tokens=tokens)
