"""Methods that the one trainer can be: each is a set of defaults for keys of the run file, and nothing else.

`algorithm.method` chooses one; a key that the run file gives itself wins. `docs/algorithm.md` has the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from pydantic import BaseModel

Method = Literal[
    "stable_reinforce",
    "stable_reinforce_without_preclip",
    "stable_reinforce_without_filter",
    "stable_reinforce_without_consistency",
    "released_code",
    "released_code_constant_length",
    "reinforce_plus_plus",
    "rloo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "gdpo",
    "ppo",
]
_PLAIN = {"algorithm.preclip": False, "algorithm.filter": "none"}
_RELEASED = {
    "algorithm.filter": "released_code",
    "algorithm.kl_coefficient": 1e-3,
    "reward.consistency_levels": "released_code",
    "reward.truncated": "as_is",
}
# Samples of one prompt against each other. Publications draw 8 to 64 of them.
_GROUP = _PLAIN | {
    "algorithm.samples_per_prompt": 4,
    "algorithm.baseline": "group_mean",
    "algorithm.group_normalize": True,
    "algorithm.normalize": "none",
}
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "stable_reinforce": {},
        "stable_reinforce_without_preclip": {"algorithm.preclip": False},
        "stable_reinforce_without_filter": {"algorithm.filter": "none"},
        "stable_reinforce_without_consistency": {"reward.use_judge": False},
        "released_code": _RELEASED,
        "released_code_constant_length": _RELEASED | {"algorithm.aggregation": "constant_length"},
        "reinforce_plus_plus": _PLAIN | {"algorithm.kl_coefficient": 1e-3},
        "rloo": _GROUP
        | {
            "algorithm.baseline": "leave_one_out",
            "algorithm.group_normalize": False,
            "algorithm.aggregation": "constant_length",
        },
        "grpo": _GROUP | {"algorithm.kl_loss_coefficient": 0.04, "algorithm.kl_loss_bound": 0.0},
        "dr_grpo": _GROUP | {"algorithm.group_normalize": False, "algorithm.aggregation": "constant_length"},
        "dapo": _GROUP
        | {
            "algorithm.clip_high": 0.28,
            "algorithm.aggregation": "token_mean",
            "algorithm.overlong_buffer": 0.2,
            "rl.dynamic_sampling_rounds": 3,
        },
        "gspo": _GROUP | {"algorithm.loss": "gspo", "algorithm.clip_low": 3e-4, "algorithm.clip_high": 4e-4},
        "cispo": _GROUP
        | {
            "algorithm.loss": "cispo",
            "algorithm.clip_low": 1.0,
            "algorithm.clip_high": 4.0,
            "algorithm.aggregation": "token_mean",
        },
        "sapo": _GROUP | {"algorithm.loss": "sapo"},
        "gdpo": _GROUP
        | {
            "algorithm.group_normalize": False,
            "algorithm.normalize_terms": True,
            "algorithm.normalize": "global",
        },
        "ppo": _PLAIN | {"algorithm.advantage_estimator": "gae", "algorithm.aggregation": "token_mean"},
    }
)
assert set(METHODS) == set(get_args(Method))
_KEYS = tuple(sorted({key for defaults in METHODS.values() for key in defaults}))
SECTIONS = frozenset(key.partition(".")[0] for key in _KEYS)


def with_defaults(given: Any, section: str, method: Any) -> Any:
    """The keys of a section with the method's defaults where it has none: of a mapping a new mapping, of a section that
    exists already a copy. An unknown method is left to the check of the key itself."""
    own = METHODS.get(method, {}) if isinstance(method, str) else {}
    named = ((key.partition("."), value) for key, value in own.items())
    defaults = {key: value for (home, _, key), value in named if home == section}
    if isinstance(given, BaseModel):
        return given.model_copy(update={k: v for k, v in defaults.items() if k not in given.model_fields_set})
    return {**defaults, **given} if isinstance(given, Mapping) else given


def describe(config: BaseModel) -> str:
    """One line for the log: the method, the keys that make it, and those that the run file has set otherwise."""
    name = str(_value(config, "algorithm.method"))
    own = METHODS[name]
    lines, changed = [], []
    for key in _KEYS:
        value, standard = _value(config, key), own.get(key, _default(config, key))
        if value != standard:
            changed.append(f"{key} = {value!r} (the method's: {standard!r})")
        elif key in own:
            lines.append(f"{key} = {value!r}")
    text = f"algorithm.method {name!r}: {', '.join(lines) or 'the defaults'}"
    return f"{text}; set otherwise by the run file: {', '.join(changed)}" if changed else text


def _value(config: BaseModel, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _default(config: BaseModel, key: str) -> Any:
    section, _, name = key.partition(".")
    return type(getattr(config, section)).model_fields[name].default
