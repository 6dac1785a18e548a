"""Megatron-based training of multimodal generative reward models with StableReinforce."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1reward.judging.compare import Comparison, Votes
    from megatron_r1reward.judging.rank import Ranking
    from megatron_r1reward.judging.reward_model import RewardModel

__version__ = "0.2.0.dev0"

__all__ = ["Comparison", "Ranking", "RewardModel", "Votes"]

_HOMES = {"Comparison": "compare", "Votes": "compare", "Ranking": "rank", "RewardModel": "reward_model"}


def __getattr__(name: str) -> object:
    """Imported at first use: the package itself loads in milliseconds, its clients and servers in a second."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.judging.{_HOMES[name]}"), name)
