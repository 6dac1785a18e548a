"""Scores that others have published on the benchmarks of `r1reward bench`, in percent, each with its source.

They are copied, not reproduced: prompts, answer orders, decoding and the treatment of unreadable answers differ between
them. `note` says where a figure is not of the benchmark's own grouping. "-": not printed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_R1, _BASE = "arXiv 2505.02835", "arXiv 2509.16127"
_LEGACY = "legacy groups"


@dataclass(frozen=True, kw_only=True)
class Published:
    """`figures` are in the order of the benchmark's columns; None: not printed."""

    system: str
    figures: tuple[float | None, ...]
    source: str
    note: str = ""


def _row(system: str, source: str, *figures: float | None, note: str = "") -> Published:
    return Published(system=system, figures=figures, source=source, note=note)


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "vl-rewardbench": ("general", "hallucination", "reasoning", "overall", "macro"),
    "multimodal-rewardbench": (
        "correctness", "preference", "knowledge", "math", "coding", "safety", "VQA", "mean of columns",
    ),
    "mm-rlhf-rewardbench": ("mcq", "long", "short", "safety", "video", "Acc", "Acc+"),
}  # fmt: skip

PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "vl-rewardbench": (
        _row("R1-Reward, greedy", _R1, 63.84, 85.71, 64.78, 71.92, 71.44, note=_LEGACY),
        _row("R1-Reward, voting@15", _R1, 66.32, 89.06, 73.70, 76.46, 76.36, note=_LEGACY),
        _row("MM-RLHF-Reward", _R1, 45.04, 50.45, 57.55, 50.15, 51.01, note=_LEGACY),
        _row("GPT-4o", _R1, 49.1, 67.6, 70.5, 65.8, 62.4),
        _row("Gemini-1.5-Pro", _R1, 50.8, 72.5, 64.2, 67.2, 62.5),
        _row("Claude-3.5-Sonnet", _R1, 43.4, 55.0, 62.3, 55.3, 53.6),
        _row("Claude-3.7-Sonnet", _R1, 68.08, 70.70, 60.81, 66.31, 66.53, note="groups unclear"),
        _row("Qwen2-VL-72B", _R1, 38.1, 32.8, 58.0, 39.5, 43.0),
        _row("IXC-2.5-Reward", _R1, 84.7, 62.5, 62.9, 65.8, 70.0),
        _row("BaseReward", _BASE, None, None, None, 82.16, 80.85),
        _row("Skywork-VL-Reward", "arXiv 2505.07263", None, None, None, 73.1, 69.0),
        _row("UnifiedReward-Think", "arXiv 2505.03318", None, None, None, 73.8, 72.3),
        _row("Proxy-GRM", "arXiv 2603.16600", None, None, None, 75.22, None),
        _row("MSRL", "arXiv 2603.25108", None, None, None, 75.9, None),
    ),
    "multimodal-rewardbench": (
        _row("R1-Reward, greedy", _R1, 77.5, 74.0, 74.9, 83.1, 79.6, 99.6, 86.5, 82.2),
        _row("R1-Reward, voting@15", _R1, 78.0, 77.2, 74.6, 81.3, 85.8, 99.4, 87.0, 83.3),
        _row("MM-RLHF-Reward", _R1, 61.7, 67.5, 54.3, 58.4, 57.9, 92.9, 76.8, 67.1),
        _row("GPT-4o", _R1, 62.6, 69.0, 72.0, 67.6, 62.1, 74.8, 87.2, 70.8),
        _row("Gemini-1.5-Pro", _R1, 63.5, 67.7, 66.3, 68.9, 55.5, 94.5, 87.2, 71.9),
        _row("Claude-3.7-Sonnet", _R1, 58.4, 60.7, 78.1, 76.3, 71.3, 72.0, 86.8, 71.9),
        _row("IXC-2.5-Reward", _R1, 60.7, 64.2, 56.8, 63.0, 50.5, 89.9, 81.1, 66.6),
        _row("BaseReward", _BASE, *[None] * 7, 72.8, note="over all rows"),
        _row("Proxy-GRM", "arXiv 2603.16600", *[None] * 7, 85.62),
        _row("MSRL", "arXiv 2603.25108", *[None] * 7, 80.5),
    ),
    "mm-rlhf-rewardbench": (
        _row("R1-Reward, greedy", _R1, 80.95, 89.19, 82.35, 75.00, 72.00, 80.59, 54.35),
        _row("R1-Reward, voting@15", _R1, 83.33, 97.30, 91.18, 78.12, 80.00, 86.47, 67.39),
        _row("Claude-3.7-Sonnet", _R1, 66.67, 91.89, 91.18, 87.50, 76.00, 82.35, 65.22),
        _row("GPT-4o", _R1, *[None] * 5, 58.23, 26.01),
        _row("IXC-2.5-Reward", _R1, *[None] * 5, 71.18, 50.00),
        _row("MM-RLHF-Reward", _R1, *[None] * 5, 82.00, 63.00),
        _row("Qwen2-VL-72B", _R1, *[None] * 5, 48.23, 13.04),
        _row("BaseReward", _BASE, *[None] * 5, 91.76, 80.43),
        _row("Proxy-GRM", "arXiv 2603.16600", *[None] * 5, 82.94, None),
    ),
}
