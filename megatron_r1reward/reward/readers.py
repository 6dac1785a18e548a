"""How a verdict is read from what a model says: by a named rule, a regular expression, or a function of the user's.

verdict_reader("boxed", "--verdict")("... \\boxed{2}")  ->  2
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.stage_data import kind_of
from megatron_r1reward.model_folder.prompt_policy import FILE, CarriedParser, PromptPolicy, read_policy
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label
from megatron_r1reward.user_parts import Part, PartError, failure, load_function, names_a_function, read_part

Reader = Callable[[str], Label | None]
STRICT = "answer"

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NAMED = re.compile(r"\b(?:response|answer|assistant|option|output|model)\s*\**\s*[\[(]?([12AB])\b", re.IGNORECASE)
_LABELS: Mapping[str, Label] = {"1": 1, "a": 1, "first": 1, "2": 2, "b": 2, "second": 2}


def strict(text: str) -> Label | None:
    """The first <answer> holds exactly 1 or 2."""
    return parse_response(text).answer


def _released(text: str) -> Label | None:
    """The released R1-Reward scripts: what is in the first answer tag, else the last digit 1 or 2; all but 1 is 2."""
    found = _ANSWER.search(text)
    content = found[1] if found else (re.findall("[12]", text) or [""])[-1]
    try:
        return 1 if float(content) == 1 else 2
    except ValueError:
        return 2


def _answer_text(text: str) -> Label | None:
    """ "Response 1 is better" and the like: the last such name in the answer tag, or in the text without a tag."""
    found = _ANSWER.search(text)
    names = _NAMED.findall(found[1] if found else text)
    return _LABELS[names[-1].lower()] if names else None


def _brackets_as_published(text: str) -> Label | None:
    """Multimodal RewardBench's own script: [[A]] anywhere, else [[B]] anywhere."""
    return 1 if "[[A]]" in text else 2 if "[[B]]" in text else None


VERDICTS: Mapping[str, Reader] = {
    STRICT: strict,  # <answer>1</answer>
    "released": _released,
    "answer-text": _answer_text,
    "brackets": lambda text: _by_pattern(r"\[\[([ABab12])\]\]", text),  # [[A]]
    "multimodal-rewardbench": _brackets_as_published,
    "boxed": lambda text: _by_pattern(r"\\boxed\{\s*(?:\\text\{)?\s*(\w+)", text),  # \boxed{1}
}


def _by_pattern(pattern: str, text: str) -> Label | None:
    """The last match's first group, as 1, A, first or 2, B, second."""
    found = re.findall(pattern, text)
    if not found:
        return None
    last = found[-1] if isinstance(found[-1], str) else found[-1][0]
    return _LABELS.get(last.strip().lower())


def verdict_reader(name: str, key: str = "--verdict") -> Reader:
    """One of `VERDICTS`, or a regular expression whose first group is 1, A or first, or 2, B or second.

    Args:
        key: what the user set, for the message.

    Raises:
        ValueError: neither.
    """
    if name in VERDICTS:
        return VERDICTS[name]
    try:
        groups = re.compile(name).groups
    except re.error as error:
        raise ValueError(f"{key} {name!r} is no regular expression: {error}") from error
    if groups < 1:
        raise ValueError(f"{key} {name!r}: give one of {', '.join(VERDICTS)}, or a pattern with a group")
    return lambda text: _by_pattern(name, text)


def users_reader(part: Part) -> Reader:
    """The user's function, held to its contract.

    Raises:
        ValueError: its file does not run.
    """
    function = load_function(part)

    def read(text: str) -> Label | None:
        row = f"the response {text[:80]!r}"
        try:
            answer = function(text)
        except Exception as error:
            raise failure(part, row, error) from error
        if answer is None:
            return None
        if isinstance(answer, bool) or answer not in (1, 2):
            raise PartError(f"{part.key} {part.name!r} returned {answer!r} for {row}: return 1, 2 or None")
        return 1 if answer == 1 else 2

    return read


def parser_of(config: RunConfig) -> CarriedParser | None:
    """How the verdicts of this stage's model are read: as the run file says, else as the model's folder does; None:
    as published.

    Raises:
        ValueError: the file cannot be read.
    """
    name = config.prompt.parser
    if kind_of(config) == "pointwise":
        if name is not None:
            raise ValueError(
                f"prompt.parser {name!r}: it reads verdicts about pairs, and a pointwise model's ratings are read "
                "strictly: remove it"
            )
        return None
    if name is None:
        policy = read_policy(config.model.path)
        return None if policy is None else policy.parser
    source = read_part("prompt.parser", name).source if names_a_function(name) else None
    return None if name == STRICT else CarriedParser(name=name, source=source)


def reader_of(config: RunConfig) -> Reader | None:
    """What `parser_of` says, ready for use; None: as published.

    Raises:
        ValueError: it cannot be used; or the model's folder carries code, and nobody said that it may run.
    """
    parser = parser_of(config)
    if parser is None:
        return None
    if config.prompt.parser is None:
        trust = "name its file as prompt.parser, or set prompt.trust_parser=true"
        return carried_reader(parser, trusted=config.prompt.trust_parser, fix=trust)
    if parser.source is None:
        return verdict_reader(parser.name, "prompt.parser")
    return users_reader(Part(key="prompt.parser", name=parser.name, source=parser.source))


def carried_reader(parser: CarriedParser, *, trusted: bool, fix: str) -> Reader:
    """The reader that a model's folder carries.

    Args:
        trusted: whether code of the folder may run.
        fix: what the user can do where it may not.

    Raises:
        ValueError: it is code and not trusted, or does not run.
    """
    if parser.source is None:
        return verdict_reader(parser.name, f"parser of {FILE}")
    part = Part(key=f"parser of {FILE}", name=parser.name, source=parser.source)
    if not trusted:
        raise ValueError(
            f"the model's {FILE} carries code that reads its verdicts ({parser.name}, sha256 {part.sha256[:12]}), "
            f"which is not run unasked: read it there, and then {fix}"
        )
    return users_reader(part)


def policy_reader(policy: PromptPolicy | None, *, trusted: bool) -> Reader | None:
    """For serving and scoring: the reader that a folder carries; None: as published."""
    if policy is None or policy.parser is None:
        return None
    return carried_reader(policy.parser, trusted=trusted, fix="allow it: --trust-parser, AskOptions(trust_parser=True)")
