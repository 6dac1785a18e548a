"""A judge with known strengths, biases and silences, in place of a model that would have to be trained first."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from megatron_r1reward.judging.ask import Item, Judgement, Order


class SimulatedJudge:
    """Prefers by Bradley-Terry strengths; the same question gets the same samples.

    Args:
        strengths: in log-odds, by response text.
        place_bias: log-odds that the response shown first gets on top.
        silence: probability of a judgement without a verdict.
    """

    def __init__(self, strengths: dict[str, float], *, place_bias: float = 0.0, silence: float = 0.0) -> None:
        self.strengths, self.place_bias, self.silence = strengths, place_bias, silence
        self.calls = 0

    async def judge(
        self, item: Item, responses: tuple[str, str], *, order: Order, n: int, temperature: float, seed: int
    ) -> list[Judgement]:
        self.calls += n
        digest = hashlib.blake2b(f"{item.key}{responses}{order}{seed}".encode(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        bias = self.place_bias if order == "12" else -self.place_bias
        p_first = 1 / (1 + math.exp(self.strengths[responses[1]] - self.strengths[responses[0]] - bias))
        draws = generator.random((n, 2))
        return [self._judgement(order, p_first, *row, greedy=temperature == 0) for row in draws]

    def _judgement(self, order: Order, p_first: float, draw: float, silent: float, *, greedy: bool) -> Judgement:
        first = p_first > 0.5 if greedy else draw < p_first
        mute = silent < self.silence
        return Judgement(
            order=order,
            choice=None if mute else 1 if first else 2,
            p_first=None if mute else p_first,
            text="",
            reasoning="",
            tokens=10,
            finish_reason="stop",
        )
