"""The shapes that published preference data have, each brought into the columns of our own rows.

A schema turns the fields of one row into `question`, `response_1`, `response_2`, `answer` and `images`, the better
response first where the source names its responses by their quality; `data import` then draws the order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1reward.data.prompt import IMAGE_PLACEHOLDER
from megatron_r1reward.data.rows import RowError
from megatron_r1reward.data.video_frames import frames_of

Fields = Mapping[str, Any]

_PROMPTS = ("prompt", "question", "instruction", "query", "input", "problem")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (
    ("response_1", "response_2"), ("response_a", "response_b"), ("answer_1", "answer_2"), ("answer1", "answer2"),
    ("output_1", "output_2"), ("response1", "response2"), ("response_0", "response_1"),
    ("completion_a", "completion_b"),
)  # fmt: skip
_WINNERS = ("winner", "preference", "better", "choice", "chosen", "label", "human_preference", "answer", "result")
_FIRST = ("a", "model_a", "response_a", "first", "left", "output1", "output_1", "response_1", "response 1", "answer 1")
_SECOND = (
    "b", "model_b", "response_b", "second", "right", "output2", "output_2", "response_2", "response 2", "answer 2",
)  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """`needs`: groups of columns, one column of each group must be there. `better_first`: the better response comes
    first, so that the order has to be drawn."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[Fields], Fields]
    better_first: bool = False
    hint: str = ""  # a column that only this schema has

    def missing(self, columns: Collection[str]) -> list[str]:
        return [" or ".join(group) for group in self.needs if not any(name in columns for name in group)]


def detect(fields: Fields) -> Schema:
    """The schema of a row.

    Raises:
        ValueError: none fits; the message names the nearest and the columns that it lacks.
    """
    columns = {name for name, value in fields.items() if value is not None}
    fitting = [schema for schema in SCHEMAS.values() if not schema.missing(columns)]
    marked = [schema for schema in fitting if schema.hint in columns]
    if marked:
        return marked[0]
    preferred = {"chosen", "rejected_response"} & columns
    if not preferred and any(name in columns for name in _CONVERSATIONS):
        text = " ".join(text for _, text in _turns(_first(fields, _CONVERSATIONS)))
        if _JUDGED.search(text):
            return SCHEMAS["llava_critic" if "first response" in text.lower() else "unified_reward"]
        fitting = [schema for schema in fitting if schema.name not in ("llava_critic", "unified_reward")]
    if fitting:
        return next((schema for schema in fitting if not schema.hint), fitting[0])
    raise ValueError(f"columns {sorted(columns)} are those of no known schema: {nearest(columns)}")


def nearest(columns: Collection[str]) -> str:
    """Which schema the columns come closest to, and what they lack."""

    def distance(schema: Schema) -> tuple[float, int]:
        missing = len(schema.missing(columns))
        return missing / len(schema.needs), missing

    schema = min(SCHEMAS.values(), key=distance)
    if distance(schema)[0] == 1.0:
        return "none of them is one of any; e.g. chosen_rejected needs prompt, chosen and rejected"
    return f"the nearest is {schema.name}, which also needs {', '.join(schema.missing(columns)) or 'other values'}"


def _first(fields: Fields, names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _turns(value: Any) -> list[tuple[str, str]]:
    """(role, text) of every turn, `{"role", "content"}` or `{"from", "value"}`; an image part becomes `<image>`, but
    beside a video, whose frames nobody has counted yet."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"a conversation is {type(value).__name__}, not a list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RowError(f"a turn is {type(turn).__name__}, not a mapping")
        role = str(turn.get("role") or turn.get("from") or "")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, list):
            place = "" if any(part.get("type") == "video" for part in content) else IMAGE_PLACEHOLDER
            content = "".join(part.get("text") or "" if part.get("type") == "text" else place for part in content)
        if not isinstance(content, str):
            raise RowError(f"the {role or 'unnamed'} turn has no text")
        turns.append((_ROLES.get(role, role), content))
    return turns


def _asked(value: Any) -> str:
    """A question in one text; of a conversation with several turns its transcript."""
    if isinstance(value, str):
        return value
    turns = _turns(value)
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _reply(value: Any) -> str:
    return value if isinstance(value, str) else _turns(value)[-1][1]


def _embedded_images(value: Any) -> list[Any]:
    """What the image parts of a conversation name, and its videos."""
    if not isinstance(value, list):
        return []
    found = []
    for turn in value:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") != "text":
                image = part.get("image") or part.get("image_url") or part.get("url")
                image = {"frames": part.get("video")} if part.get("type") == "video" else image
                found.append(image.get("url") if isinstance(image, Mapping) and "url" in image else image)
    return [image for image in found if image is not None]


def _row(
    fields: Fields,
    question: Any,
    responses: tuple[Any, Any],
    answer: Any,
    images: Any = None,
    inside: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
) -> dict[str, Any]:
    """`images`: that the question's turns show; else those of the row's columns. `inside`: those of each response."""
    if images in (None, []):
        images = next((fields[name] for name in ("images", "image", "image_path") if fields.get(name)), None)
        images = frames_of(fields) if images is None else images
    first, second = (_shows(text, own) for text, own in zip(responses, inside, strict=True))
    if any(inside):
        asked = images if isinstance(images, list) else [] if images is None else [images]
        images = [*asked, *inside[0], *inside[1]]
    if isinstance(question, str) and (fields.get("video") or fields.get("videos")):
        question = question.replace("<video>", "").strip()
    return {
        "id": _first(fields, ("id", "ID", "idx", "question_id", "uuid")),
        "question": question,
        "response_1": first,
        "response_2": second,
        "answer": answer,
        "images": images,
        "response_images": [len(inside[0]), len(inside[1])] if any(inside) else None,
        "category": _first(fields, ("category", "Category")),
        "source": _first(fields, ("source", "data_source", "origin_dataset", "query_source", "ds_name")),
    }


def _shows(response: Any, images: Sequence[Any]) -> Any:
    """The text of a response with a place for each of its images, which is the end where it has none."""
    shown = response.count(IMAGE_PLACEHOLDER) if isinstance(response, str) else 0
    if shown == len(images) or not isinstance(response, str):
        return response
    if not images:
        raise RowError(
            f"a response shows an image ({IMAGE_PLACEHOLDER}) that the row does not name: name it in chosen_images, "
            "rejected_images (or those of the other columns), or as an image part of the turn"
        )
    if shown:
        raise RowError(f"a response shows {shown} {IMAGE_PLACEHOLDER}, the row names {len(images)} images for it")
    return "\n".join([*([response] if response.strip() else []), *([IMAGE_PLACEHOLDER] * len(images))])


def _inside(fields: Fields, column: str, value: Any) -> list[Any]:
    """The images of a response: image parts of its turn, else COLUMN_images or COLUMN_image."""
    turns = [value] if isinstance(value, Mapping) else value
    found = _embedded_images(turns[-1:]) if isinstance(turns, list) else []
    if any(isinstance(one, Mapping) and "frames" in one for one in found):
        raise RowError(
            f"a response shows a video: name its frames as images, in {column}_images or in parts of the turn"
        )
    named = _first(fields, (f"{column}_images", f"{column}_image"))
    return found or (list(named) if isinstance(named, list) else [] if named is None else [named])


def _r1_reward(fields: Fields) -> Fields:
    return fields


def _chosen_rejected(fields: Fields) -> Fields:
    chosen, rejected = fields.get("chosen"), _first(fields, ("rejected", "rejected_response"))
    prompt, conversation = _first(fields, _PROMPTS), _first(fields, _CONVERSATIONS)
    images: list[Any] = []
    inside = _inside(fields, "chosen", chosen), _inside(fields, "rejected", rejected)
    if conversation is not None:
        turns = _turns(conversation)
        images = _embedded_images(conversation)
        if chosen is None:
            if turns[-1][0] != "assistant":
                raise RowError("the conversation does not end with the better response")
            inside = _embedded_images(conversation[-1:]), inside[1]
            images = _embedded_images(conversation[:-1])
            chosen, turns = turns[-1][1], turns[:-1]
        prompt = [{"role": role, "content": text} for role, text in turns]
    elif prompt is None:
        prompt, chosen, rejected = _split_dialogues(chosen, rejected)
        images = _embedded_images(prompt)
    else:
        images = _embedded_images(prompt)
    return _row(fields, _asked(prompt), (_reply(chosen), _reply(rejected)), 1, images, inside)


def _split_dialogues(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two whole dialogues share, and the replies in which they differ."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        if len(chosen) < 2 or _turns(chosen)[:-1] != _turns(rejected)[:-1]:
            raise RowError("chosen and rejected are not replies to the same turns")
        return chosen[:-1], chosen[-1:], rejected[-1:]
    mark = "\n\nAssistant:"
    if isinstance(chosen, str) and isinstance(rejected, str) and mark in chosen and mark in rejected:
        prompt, _, reply = chosen.rpartition(mark)
        other_prompt, _, other = rejected.rpartition(mark)
        if prompt == other_prompt:
            return prompt.removeprefix("\n\nHuman:").strip(), reply.strip(), other.strip()
    raise RowError("no prompt, and chosen and rejected are not dialogues that share one")


def _pairwise(fields: Fields) -> Fields:
    columns = next((pair for pair in _PAIRS if all(fields.get(name) is not None for name in pair)), None)
    if columns is None:
        raise RowError("no two responses")
    winner = _first(fields, _WINNERS)
    responses = _reply(fields[columns[0]]), _reply(fields[columns[1]])
    inside = _inside(fields, columns[0], fields[columns[0]]), _inside(fields, columns[1], fields[columns[1]])
    return _row(fields, _asked(_first(fields, _PROMPTS)), responses, _winner(winner), inside=inside)


def _winner(value: Any) -> Any:
    """1, 2 or a number as it is stored."""
    name = value.strip().lower() if isinstance(value, str) else value
    if name in _FIRST:
        return 1
    if name in _SECOND:
        return 2
    if isinstance(name, str) and ("tie" in name or name in ("both", "neither", "equal")):
        raise RowError("a tie: no response is better")
    return value


def counts_from_zero(rows: Iterable[Fields | None]) -> bool:
    """Whether the winners of pairwise rows are 0 and 1, the number of the better response counted from 0."""
    zero = False
    for fields in rows:
        said = "" if fields is None else str(_first(fields, _WINNERS)).strip().removesuffix(".0").lower()
        if said == "2" or said in _FIRST or said in _SECOND:
            return False  # the rest need not be read
        zero = zero or said == "0"
    return zero


def _vl_rewardbench(fields: Fields) -> Fields:
    responses, ranking = fields["response"], fields["human_ranking"]
    if not isinstance(responses, list) or len(responses) != 2 or sorted(ranking or ()) != [0, 1]:
        raise RowError(f"not two responses with the ranks 0 and 1: {ranking!r}")
    return _row(fields, fields["query"], (responses[0], responses[1]), 1 if ranking[0] == 0 else 2)


def _multimodal_rewardbench(fields: Fields) -> Fields:
    responses = fields["Output1"], fields["Output2"]
    return _row(fields, fields["Text"], responses, _winner(fields["Better"]), fields.get("Image"))


_JUDGED = re.compile(
    r"(?:Question|Query)\s*:\s*(?:\[(?P<q>.*?)\]|(?P<q2>.*?))\s*\n"
    r"[-\s]*(?:The first response|Answer 1)\s*:\s*(?:\[(?P<a>.*)\]|(?P<a2>.*?))\s*\n"
    r"[-\s]*(?:The second response|Answer 2)\s*:\s*(?:\[(?P<b>.*)\]|(?P<b2>.*?))\s*(?:\nASSISTANT:|\n\n\d+\.|$)",
    re.DOTALL,
)
_VERDICT = re.compile(
    r"\b(first|second)(?: response| answer)? is (?:\w+ )?better|\b(?:response|answer) ([12]) is (?:\w+ )?better", re.I
)


def _judged_conversation(fields: Fields) -> Fields:
    """A judge's conversation: the prompt holds question and responses in a template, the reply says which is better."""
    turns = _turns(_first(fields, _CONVERSATIONS))
    if len(turns) != 2:
        raise RowError(f"a judge's conversation has 2 turns, this one {len(turns)}")
    match = _JUDGED.search(turns[0][1].rstrip())
    if match is None:
        raise RowError("the prompt does not compare two responses (a pointwise row?)")
    found = {next(filter(None, groups)).lower() for groups in _VERDICT.findall(turns[1][1])}
    verdicts = {1 if name in ("first", "1") else 2 for name in found}
    if len(verdicts) != 1:
        raise RowError("the reply does not name one better response")
    question, first, second = (match[name] if match[name] is not None else match[f"{name}2"] for name in "qab")
    return _row(fields, question, (first, second), verdicts.pop())


def _make(
    name: str, convert: Callable[[Fields], Fields], *needs: Any, hint: str = "", better_first: bool = False
) -> Schema:
    groups = tuple((need,) if isinstance(need, str) else tuple(need) for need in needs)
    return Schema(name=name, needs=groups, convert=convert, hint=hint, better_first=better_first)


_FIRSTS, _SECONDS = zip(*_PAIRS, strict=True)
_ASKED = (*_PROMPTS, *_CONVERSATIONS)
SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in (
        _make("r1_reward", _r1_reward, ("message", "response_1"), ("message", "response_2"), "answer"),
        _make("vl_rewardbench", _vl_rewardbench, "query", "response", "human_ranking", hint="human_ranking"),
        _make("multimodal_rewardbench", _multimodal_rewardbench, "Text", "Output1", "Output2", "Better",
              hint="Output1"),
        _make("rlaif_v", _chosen_rejected, "question", "chosen", "rejected", "image", hint="origin_dataset",
              better_first=True),
        _make("mm_rlhf", _chosen_rejected, _ASKED, "chosen", "rejected", ("image", "video", "videos"),
              hint="chosen_reason", better_first=True),
        _make("skywork", _chosen_rejected, "chosen", "rejected", "source", better_first=True),
        _make("chosen_rejected", _chosen_rejected, ("chosen", *_CONVERSATIONS), ("rejected", "rejected_response"),
              better_first=True),
        _make("pairwise", _pairwise, _PROMPTS, _FIRSTS, _SECONDS, _WINNERS),
        _make("llava_critic", _judged_conversation, _CONVERSATIONS),
        _make("unified_reward", _judged_conversation, _CONVERSATIONS),
    )
}  # fmt: skip
