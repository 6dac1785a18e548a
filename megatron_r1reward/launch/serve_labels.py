"""`r1reward serve-labels`: the reward of this package for people who train with the original code base."""

from __future__ import annotations

import logging

import uvicorn

from megatron_r1reward.config.schema import RunConfig, ServeSection
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.launch.stage_servers import open_judge
from megatron_r1reward.network.tokens import is_loopback, token_from
from megatron_r1reward.serving.labels import LabelTable
from megatron_r1reward.serving.remote_reward import ROUTE, RemoteReward, reward_app

log = logging.getLogger(__name__)


def serve(config: RunConfig) -> None:
    """Serve until SIGINT or SIGTERM; labels come from `data.train`, the judge from [judge].

    Raises:
        ValueError: the address is on the network and there is no token, or the data has no labels.
    """
    section = config.serve
    check_models(config, "judge")
    token = _token(section)
    labels = LabelTable(config.data.train)
    log.info(
        "%d labels (%d rows without, %d messages with two answers)", len(labels), labels.skipped, len(labels.ambiguous)
    )
    with open_judge(config) as judge:
        app = reward_app(RemoteReward(config.reward, labels, judge), token=token)
        log.info("POST http://%s:%d%s", section.host, section.port, ROUTE)
        uvicorn.run(app, host=section.host, port=section.port, log_level="warning", access_log=False)


def _token(section: ServeSection) -> str | None:
    token = token_from(section.token_variable)
    if token is None and not is_loopback(section.host) and not section.allow_anonymous:
        raise ValueError(
            f"serve.host {section.host} is on the network, and {section.token_variable} holds no token: set it, or "
            "serve.allow_anonymous = true for clients that cannot send one"
        )
    return token
