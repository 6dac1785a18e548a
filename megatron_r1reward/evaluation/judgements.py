"""Judgements of a benchmark's pairs: asked for once, kept line by line, read by whoever counts them.

    {"key", "row", "id", "order", "sample", "temperature", "text", "choice", "right", "p_first", "tokens",
     "finish_reason", "content", "model", "judged"}

`row` is the pair's place in its file, `id` what that calls it, as it may call others; `order` "21": the responses were
exchanged; `choice` and `p_first`, the probability that the answer token's distribution gives (null: the endpoint does
not tell), speak of the stored order.
`content` (`ContentKeys.question`) says which row it is in any other file: `data.judgements` selects by it.
`key` is the content of what was asked, of whom and how, so that a run that was killed asks for nothing twice. How a
verdict is read is no part of it: the texts are there and are read again. `judged` is what a consistency judge says
about a sample, {"by", "consistent"}; missing: it was not asked, or did not say.

The text of a scalar reward model is the two rewards, of a pointwise one also what it wrote. They are asked in the
stored order alone: what they say of a response does not depend on the other one, so the line holds for both orders.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.evaluation.judged_votes import VoteJudge, ask_judge
from megatron_r1reward.evaluation.result import JudgedSamples
from megatron_r1reward.files import recover_jsonl, write_jsonl
from megatron_r1reward.judging.ask import ORDERS, Item, Judgement, Order, as_shown
from megatron_r1reward.judging.compare import Votes, rewards_of, seed_of
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.judging.rewards import Rates, Scores, judged_rewards
from megatron_r1reward.reward.readers import Reader
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label, Preference

log = logging.getLogger(__name__)

_CONCURRENT_REQUESTS = 64
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What every pair is asked, in both orders: greedily once, and `samples` times at `temperature`."""

    asked_as: tuple[object, ...]  # whoever is asked and how, as far as an answer depends on it; JSON
    read: Reader
    samples: int
    temperature: float
    seed: int
    orders: tuple[Order, ...] = ORDERS  # of a model that reads one response the first: what it says holds in both


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Lines by place and order; a request that failed is missing, and its reason is in `failed`."""

    greedy: Mapping[tuple[int, Order], Line]
    samples: Mapping[tuple[int, Order], Sequence[Line]]
    failed: Sequence[str]
    asked: int
    tokens: int  # generated, of all that was answered; of a scalar reward model: read

    def judgements(self, place: int, order: Order) -> list[Judgement]:
        """The samples for `measure_votes`: choice 1 is the better response."""
        return [
            Judgement(
                order=order,
                choice=None if line["right"] is None else 1 if line["right"] else 2,
                p_first=_p_right(line),
                text=line["text"],
                reasoning="",
                tokens=line["tokens"],
                finish_reason=line["finish_reason"],
                consistent=line.get("judged", {}).get("consistent"),
            )
            for line in self.samples.get((place, order), ())
        ]


@dataclass(frozen=True, kw_only=True)
class _Request:
    key: str
    place: int
    order: Order
    sample: int
    temperature: float
    preference: Preference  # its images are read when it is asked: all of a benchmark's do not fit in memory


def judge_pairs(
    model: RewardModel,
    preferences: Mapping[int, Preference],
    path: Path,
    asking: Asking,
    names: Mapping[int, str | None],
) -> Judged:
    """Ask for what `path` does not hold, and append it there.

    Args:
        preferences: by their place in the benchmark's file.
        names: the ids that the file gives them, by place.
    """
    requests = list(_requests(preferences, asking))
    known = _recorded(path, preferences, asking.read)
    keys = ContentKeys()
    said = {
        place: {"id": names.get(place), "content": keys.question(row), "model": str(asking.asked_as[0])}
        for place, row in preferences.items()
    }
    _complete(path, known, requests, said)
    todo = [request for request in requests if request.key not in known]
    failed: list[str] = []
    done = len(requests) - len(todo)  # by earlier runs, whose speed says nothing about the time that remains
    with (
        path.open("a", encoding="utf-8", errors="backslashreplace") as sink,  # as `write_jsonl`
        tqdm(desc="bench", total=len(requests), initial=done, disable=None) as bar,
    ):

        async def one(request: _Request, slots: asyncio.Semaphore) -> None:
            async with slots:
                try:
                    line = await _ask(model, request, asking.seed)
                except (ValueError, RuntimeError) as error:
                    failed.append(f"row {request.place}, order {request.order}: {error}")
                    return
            line |= said[request.place]
            known[request.key] = line
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()
            bar.update()

        async def everything() -> None:
            slots = asyncio.Semaphore(_CONCURRENT_REQUESTS)
            async with asyncio.TaskGroup() as group:
                for request in todo:
                    group.create_task(one(request, slots))

        model.run(everything())
    for problem in failed[:3]:
        log.warning("%s: not judged: %s", path, problem)
    greedy: dict[tuple[int, Order], Line] = {}
    samples: dict[tuple[int, Order], list[Line]] = {}
    for request in requests:
        if request.key in known:
            where = (request.place, request.order)
            if request.temperature == 0.0:
                greedy[where] = known[request.key]
            else:
                samples.setdefault(where, []).append(known[request.key])
    if asking.orders != ORDERS:
        greedy |= {(place, "21"): {**line, "order": "21"} for (place, _), line in greedy.items()}
    tokens = sum(known[request.key]["tokens"] for request in requests if request.key in known)
    return Judged(greedy=greedy, samples=samples, failed=failed, asked=len(requests), tokens=tokens)


def _complete(
    path: Path,
    known: Mapping[str, dict[str, Any]],
    requests: Sequence[_Request],
    said: Mapping[int, Mapping[str, Any]],
) -> None:
    """Lines of earlier versions do not say what they are about."""
    lacking = [
        request
        for request in requests
        if request.key in known and not said[request.place].keys() <= known[request.key].keys()
    ]
    for request in lacking:
        known[request.key].update(said[request.place])
    if lacking:
        write_jsonl(path, known.values())


def _requests(preferences: Mapping[int, Preference], asking: Asking) -> Iterator[_Request]:
    ways: list[tuple[float, int]] = [(0.0, 0), *((asking.temperature, number) for number in range(asking.samples))]
    for place, preference in preferences.items():
        item = _item(preference)
        for order in asking.orders:
            asked = [place, item.key, *preference.responses, order, preference.label, *asking.asked_as]
            for temperature, number in ways:
                said = json.dumps(asked + ([] if temperature == 0.0 else [temperature, number]))
                key = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
                yield _Request(
                    key=key, place=place, order=order, sample=number, temperature=temperature, preference=preference
                )


def _item(preference: Preference) -> Item:
    return Item.of(preference.question, preference.image_paths, preference.response_images)


def judge_samples(judged: Judged, path: Path, judge: VoteJudge) -> JudgedSamples | str:
    """Ask whether each sample's reasoning supports its verdict, and write that beside it, in `judged` and in `path`.

    Returns:
        How often the judge says what, or why there are no judge-filtered votes.
    """
    lines = [line for part in judged.samples.values() for line in part if line["choice"] is not None]
    cases = [(parse_response(line["text"]).reasoning, as_shown(line["choice"], line["order"])) for line in lines]
    said, found = ask_judge(judge, cases)
    for line, consistent in zip(lines, said, strict=True):
        line.pop("judged", None)
        if consistent is not None:
            line["judged"] = {"by": judge.name, "consistent": consistent}
    told = {line["key"]: line for line in lines}
    recorded = recover_jsonl(path)
    if any(line != told.get(line["key"], line) for line in recorded):
        write_jsonl(path, [told.get(line["key"], line) for line in recorded])
    return found


async def _ask(model: RewardModel, request: _Request, seed: int) -> dict[str, Any]:
    """One judgement as a line of the record."""
    pair, order = request.preference.responses, request.order
    item = _item(request.preference)
    if isinstance(model.model, Scores | Rates):
        rewards = await rewards_of(model.model, item, pair, Votes(), seed=seed)
        said, tokens = judged_rewards(*rewards, order), sum(one.tokens for one in rewards)
    else:
        (said,) = await model.model.judge(
            item,
            pair,
            order=order,
            n=1,
            temperature=request.temperature,
            seed=(seed_of(seed, item, pair, order) + request.sample) % 2**31,
        )
        tokens = said.tokens
    return {
        "key": request.key,
        "row": request.place,
        "order": order,
        "sample": request.sample,
        "temperature": request.temperature,
        "text": said.text,
        "choice": said.choice,
        "right": _right(said.choice, request.preference),
        "p_first": said.p_first,
        "tokens": tokens,
        "finish_reason": said.finish_reason,
    }


def _recorded(path: Path, preferences: Mapping[int, Preference], read: Reader) -> dict[str, dict[str, Any]]:
    """The lines of earlier runs, their verdicts read as this one reads them."""
    lines, changed = {line["key"]: line for line in recover_jsonl(path)}, False
    for line in lines.values():
        answer = read(line["text"])
        choice = None if answer is None else as_shown(answer, line["order"])
        if choice != line["choice"] and line["row"] in preferences:
            line |= {"choice": choice, "right": _right(choice, preferences[line["row"]])}
            line["p_first"] = None
            line.pop("judged", None)  # that was about another verdict
            changed = True
    if changed:
        write_jsonl(path, lines.values())
    return lines


def _p_right(line: Line) -> float | None:
    """The probability that was given to the better response."""
    p = line.get("p_first")
    if p is None or line["right"] is None:
        return None
    return p if (line["choice"] == 1) == line["right"] else 1.0 - p


def _right(choice: Label | None, preference: Preference) -> bool | None:
    return None if choice is None else choice == preference.label
