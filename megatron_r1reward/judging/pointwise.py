"""A pointwise reward model behind chat servers: one response in, a reasoning and a rating out.

    question, images, response --template with {answer}--> chat request, n samples --> mean of the ratings

It is asked as it was trained (`PromptBuilder` with a pointwise template): one user turn, the images first. Ratings are
read strictly (`reward.rules`); the reward is their mean, over the samples that have one.
"""

from __future__ import annotations

import statistics

from megatron_r1reward.judging.ask import ChatClient, Item
from megatron_r1reward.judging.rewards import Reward
from megatron_r1reward.reward.rules import parse_response


class RatingClient(ChatClient):
    """A pointwise reward model behind OpenAI-compatible servers; see `Endpoint`."""

    async def rate(self, item: Item, response: str, *, n: int, temperature: float, seed: int) -> Reward:
        """Sample `n` ratings of `response`; arguments and errors as `ModelClient.judge`."""
        inside = item.response_images  # of the first response, see `Item.alone`
        messages = self.options.prompt.messages(item.question, (response, ""), item.images, response_images=inside)
        completion = await self._sampled(item, messages, n=n, temperature=temperature, seed=seed)
        texts = tuple(choice.message.content or "" for choice in completion.choices)
        ratings = [rating for text in texts if (rating := parse_response(text).rating) is not None]
        return Reward(
            value=statistics.fmean(ratings) if ratings else None,
            tokens=completion.usage.completion_tokens if completion.usage is not None else 0,
            error=statistics.stdev(ratings) / len(ratings) ** 0.5 if len(ratings) > 1 else 0.0,
            unparsable=n - len(ratings),
            texts=texts,
        )
