"""The shuffled-images control: what does the model score when it sees somebody else's images?

A model that judges from the pixels falls to chance; one that judges from the texts alone does not.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from megatron_r1reward.data.image_files import upright_size
from megatron_r1reward.types import Preference


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
