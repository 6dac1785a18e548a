"""An untrained model as the judge: a real server makes it choose between the two replies."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.rollout.pool import SERVED_NAME, RolloutPool

pytestmark = pytest.mark.e2e


def test_every_reply_is_a_verdict(shared_pool: RolloutPool) -> None:
    section = JudgeSection(model=SERVED_NAME, retries=0, max_tokens=16)
    judge = ConsistencyJudge(section, shared_pool.group.endpoints)
    verdicts = asyncio.run(judge.judge_many([(f"The image shows {i}.\nResponse 1 says {i}.", 1) for i in range(12)]))
    assert Counter(verdicts)["unknown"] == 0
    assert judge.counts["unreadable"] == 0
    assert not judge.free, "the server takes the constraint"
