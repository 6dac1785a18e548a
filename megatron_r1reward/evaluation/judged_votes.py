"""Judge-filtered votes: whether the reasoning of a stored sample supports its verdict, asked of a consistency judge.

    (reasoning, verdict as shown) of every sample --`reward.consistency`, verdicts on disk--> supported, not, or unknown

The judge is the one of the reward: text alone, the last lines of the reasoning. Equal questions are asked once, and
what it has said is remembered by content as it comes, so a run that was killed asks for the rest. Where it says nothing
about too many samples there are no judge-filtered votes, but the reason: they would be the votes of all samples.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.evaluation.result import JudgedSamples
from megatron_r1reward.hub_name import local_folder, model_name
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeDownError
from megatron_r1reward.reward.verdict_cache import VerdictCache
from megatron_r1reward.servers.build import judge_server
from megatron_r1reward.servers.command import sees_gpu
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.process import start_servers
from megatron_r1reward.types import JudgeVerdict, Label

log = logging.getLogger(__name__)
Case = tuple[str, Label]  # a reasoning, and the response that it should support, as the model saw them
_SAID: Final = {"consistent": True, "inconsistent": False}
_CHUNK = 512  # questions after which their verdicts are on disk
_MOST_UNKNOWN = 0.1  # share of the samples


class Judges(Protocol):
    async def judge_many(self, cases: Sequence[Case]) -> list[JudgeVerdict]: ...


@dataclass(frozen=True, kw_only=True)
class VoteJudge:
    """A judge, and what people call it."""

    judge: Judges
    name: str


@dataclass(frozen=True, kw_only=True)
class JudgeAccess:
    """What `r1reward bench` is told about a judge."""

    judge: str  # folder, "org/name@revision", or URLs of servers, comma-separated
    judge_name: str | None = None  # at the URLs; None: the first that they list
    api_key_variable: str = "OPENAI_API_KEY"

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self.judge.split(",")) if "://" in self.judge else ()

    def check(self) -> Path:
        """The folder, where it is one. ValueError when it is none, or has a name that only servers have."""
        if self.urls:
            return Path()
        if self.judge_name is not None:
            raise ValueError(f"--judge-name {self.judge_name!r} is for servers, {self.judge} is a folder: leave it out")
        folder = local_folder(self.judge)
        if not (folder / "config.json").is_file():
            raise ValueError(f"--judge {folder} has no config.json: give a Hugging Face model folder, or URLs")
        return folder


def ask_judge(judge: VoteJudge | str, cases: Sequence[Case]) -> tuple[list[bool | None], JudgedSamples | str]:
    """Whether each case's reasoning supports its verdict (None: the judge does not say), and how often it says what.

    Returns:
        In place of the counts, why there are no judge-filtered votes: `judge` itself where that is a reason, or that
        too many cases are without an answer.
    """
    if isinstance(judge, str):
        return [None] * len(cases), judge
    verdicts = asyncio.run(_ask(judge.judge, cases))
    counts = Counter(verdicts)
    unknown = len(cases) - counts["consistent"] - counts["inconsistent"]
    said = [_SAID.get(verdict) for verdict in verdicts]
    if unknown > _MOST_UNKNOWN * len(cases) or not cases:
        reason = f"judge {judge.name} gave no verdict on {unknown} of {len(cases)} samples: see the log, and run again"
        reason = reason if cases else "no sample has a verdict"
        log.warning("no judge-filtered votes: %s", reason)
        return said, reason
    found = JudgedSamples(
        judge=judge.name, consistent=counts["consistent"], inconsistent=counts["inconsistent"], unknown=unknown
    )
    return said, found


async def _ask(judge: Judges, cases: Sequence[Case]) -> list[JudgeVerdict]:
    distinct = list(dict.fromkeys(cases))
    known: dict[Case, JudgeVerdict] = {}
    try:
        for start in range(0, len(distinct), _CHUNK):
            part = distinct[start : start + _CHUNK]
            known |= zip(part, await judge.judge_many(part), strict=True)
    except JudgeDownError as error:
        log.warning("%s", error)
    return [known.get(case, "unknown") for case in cases]


@contextmanager
def open_vote_judge(access: JudgeAccess, out: Path, *, max_model_len: int) -> Iterator[VoteJudge]:
    """The judge at URLs, or a folder that is served here until the end; its verdicts are in `out`.

    Raises:
        ValueError: it is no model folder.
        ServerError: its server did not start.
    """
    with ExitStack() as stack:
        verdicts = stack.enter_context(closing(VerdictCache(out / "judge-verdicts.sqlite")))
        if access.urls:
            section = JudgeSection(urls=access.urls, model=access.judge_name, api_key_variable=access.api_key_variable)
            judge = ConsistencyJudge(section, section.urls, cache=verdicts)
            yield VoteJudge(judge=judge, name=access.judge_name or access.judge)
            return
        folder = access.check()
        # vLLM on a CPU would take 92 % of the machine's memory for its cache.
        cpu: dict[str, Any] = {} if sees_gpu() else {"kv_cache_bytes": 1 << 30}
        section = JudgeSection(model_path=folder, max_model_len=max_model_len, **cpu)
        server = judge_server(section, 0, log_path=out / "judge.log")
        stack.callback(server.close)
        start_servers([server], log.info)
        group = stack.enter_context(closing(ServerGroup(section, name="judge", servers=[server], served_name="judge")))
        yield VoteJudge(judge=ConsistencyJudge(section, group.endpoints, cache=verdicts), name=model_name(folder))
