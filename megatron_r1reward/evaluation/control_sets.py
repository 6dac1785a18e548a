"""Control sets, made of the data that is evaluated.

Pairs that preference data lack: a taste for a place shows where no response is better.

    wrong against wrong   two rejected responses to an item, or one and an answer that others gave to the same question
    near-equal            the better response, with and without its final full stop
    identical             the better response twice

Best-of-N and group rewards consist mostly of such pairs; an evaluation of right against wrong cannot see them.

Pairs with somebody else's images: a model that judges from the pixels falls to chance; one that judges from the texts
alone does not.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from megatron_r1reward.data.image_files import upright_size
from megatron_r1reward.types import Preference

WRONG, NEAR, SAME = "wrong against wrong", "near-equal", "identical"
_WORD = re.compile(r"\w+")


def make_pair_kinds(preferences: Sequence[Preference], count: int, seed: int) -> dict[str, tuple[Preference, ...]]:
    """At most `count` pairs of each kind, of items drawn by the seed. A kind of which none can be made is empty.

    Their label is 1 and says nothing; their category is that of the preference they are made of.
    """
    if count == 0:
        return {}
    rng = np.random.default_rng(seed)
    shown = [preferences[index] for index in rng.permutation(len(preferences))]
    drawn = [one for one in shown if not any(one.response_images)]  # texts are changed here, not images
    wrong = _wrong_pairs(drawn, rng)
    return {
        WRONG: tuple(wrong[:count]),
        NEAR: tuple(_pair(one, NEAR, (_better(one), _toggled(_better(one)))) for one in drawn[:count]),
        SAME: tuple(_pair(one, SAME, (_better(one), _better(one))) for one in drawn[:count]),
    }


def _wrong_pairs(drawn: Sequence[Preference], rng: np.random.Generator) -> list[Preference]:
    """One pair per item that has two wrong responses."""
    right: dict[Hashable, set[str]] = defaultdict(set)
    rejected: dict[Hashable, dict[str, None]] = defaultdict(dict)
    answers: dict[str, dict[str, None]] = defaultdict(dict)  # to a question, whatever the pictures
    for one in drawn:
        right[_item(one)].add(_better(one))
        rejected[_item(one)][_worse(one)] = None
        answers[one.question] |= dict.fromkeys(one.responses)
    found, seen = [], set[Hashable]()
    for one in drawn:
        item = _item(one)
        wrong = [text for text in rejected[item] if text not in right[item]]
        if item in seen or not wrong:
            continue
        seen.add(item)
        others = wrong[1:] or [
            text
            for text in answers[one.question]
            if text not in wrong and all(_says_otherwise(text, better, wrong[0]) for better in right[item])
        ]
        if others:
            pair = (wrong[0], others[rng.integers(len(others))])
            found.append(_pair(one, WRONG, pair if rng.random() < 0.5 else pair[::-1]))
    return found


def _says_otherwise(text: str, right: str, wrong: str) -> bool:
    """No word of the right response that the wrong one lacks is in it: it is not the right response in other words, as
    far as words tell."""
    telling = set(_WORD.findall(right.lower())) - set(_WORD.findall(wrong.lower()))
    return bool(telling) and not telling & set(_WORD.findall(text.lower()))


def _pair(origin: Preference, kind: str, responses: tuple[str, str]) -> Preference:
    return dataclasses.replace(origin, id=f"{origin.id}/{kind}", responses=responses, label=1)


def _toggled(text: str) -> str:
    return text[:-1] if text.endswith(".") else f"{text}."


def _better(one: Preference) -> str:
    return one.responses[one.known_label - 1]


def _worse(one: Preference) -> str:
    return one.responses[2 - one.known_label]


def _item(one: Preference) -> Hashable:
    return one.question, one.image_paths


def shuffle_images(preferences: Sequence[Preference], seed: int) -> tuple[Preference, ...]:
    """The same preferences, each with the images of another one: same number and sizes, never its own.

    Sizes are kept because they decide how many image tokens the prompt has: nothing but the content changes.
    Preferences for which no such partner exists are left out; the others keep their order.

    Raises:
        ValueError: fewer than two preferences have a partner.
    """
    groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for index, preference in enumerate(preferences):
        groups[tuple(upright_size(path) for path in preference.image_paths)].append(index)
    rng = np.random.default_rng(seed)
    donors: dict[int, int] = {}
    for members in groups.values():
        donors |= _derange(members, [preferences[index].image_paths for index in members], rng)
    if len(donors) < 2:
        raise ValueError(
            f"none of the {len(preferences)} pairs shares its image sizes with a pair that has other images: "
            "the shuffled-images control needs images of equal size, set evaluation.shuffled_images_control = false"
        )
    return tuple(
        dataclasses.replace(preferences[index], image_paths=preferences[donors[index]].image_paths)
        for index in sorted(donors)
    )


def _derange(members: Sequence[int], images: Sequence[tuple[str, ...]], rng: np.random.Generator) -> dict[int, int]:
    """Receiver -> donor within one group, such that their images differ; several members may share the same images.

    Members are laid out in blocks of equal images and rotated by the longest block: nobody lands in his own block as
    long as that block is no longer than all the others together, so its surplus is dropped.
    """
    blocks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for position in rng.permutation(len(members)):
        blocks[images[position]].append(members[position])
    largest = max(blocks.values(), key=len)
    del largest[len(members) - len(largest) :]
    row = [member for block in blocks.values() for member in block]
    return {receiver: row[(place + len(largest)) % len(row)] for place, receiver in enumerate(row)}
