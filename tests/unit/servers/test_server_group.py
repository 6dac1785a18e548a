"""A group of servers that somebody else started."""

from __future__ import annotations

from contextlib import closing

import pytest

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.member import ServerError


def test_a_refused_token_is_an_error_at_once_that_names_the_variable(fake_vllm) -> None:
    fake = fake_vllm()
    fake.refused.add("/v1/completions")
    fake.refusal = 401
    section = ServerSection(startup_timeout_s=3600, token_variable="SECRET_OF_THIS_TEST")
    with (
        closing(ServerGroup(section, name="rollout", urls=[fake.url], served_name="policy")) as group,
        pytest.raises(ServerError, match=r"refuses the bearer token: set SECRET_OF_THIS_TEST .* answered 401"),
    ):
        group.wait_until_ready()
