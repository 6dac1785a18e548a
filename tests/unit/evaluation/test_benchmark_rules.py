"""Recorded verdicts become the numbers that the benchmarks' own scripts compute."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_r1reward.evaluation.benchmark_rules import RULES, both_orders_score, official_score
from megatron_r1reward.judging.judge_prompt import verdict_reader

VL, MM, MRB = (RULES[name] for name in ("vl-rewardbench", "mm-rlhf-rewardbench", "multimodal-rewardbench"))


def vl_rows(**right: int) -> tuple[list[dict], list[bool]]:
    """Rows with the ids that VL-RewardBench has, so many of each source right; 25 of the reasoning ids twice."""
    sizes = {
        "hallucination_pair": 448, "RLAIF-V": 233, "RLHF-V": 68, "wildvision-battle": 173, "VLFeedback": 10,
        "mathverse": 167, "mmmu_pro_test_Biology": 151,
    }  # fmt: skip
    rows, verdicts = [], []
    for source, size in sizes.items():
        wanted = right[source.split("_")[0].replace("-", "_").lower()]
        numbers = [i - 19 if source == "mathverse" and i >= 148 else i for i in range(size)]
        numbers = [i - 6 if source.startswith("mmmu") and i >= 145 else i for i in numbers]
        rows += [{"id": f"{source}_{number}"} for number in numbers]
        verdicts += [i < wanted for i in range(size)]
    return rows, verdicts


def counts(score) -> dict[str, tuple[int, int]]:
    return {name: (group.accuracy.right, group.accuracy.counted) for name, group in score.groups.items()}


def test_vl_rewardbench_by_its_own_and_by_the_legacy_grouping() -> None:
    rows, right = vl_rows(
        hallucination=326, rlaif_v=200, rlhf_v=15, wildvision_battle=120, vlfeedback=3, mathverse=130, mmmu=109
    )
    assert (len(rows), len({row["id"] for row in rows})) == (1250, 1225)
    score = official_score(VL, rows, right)
    assert counts(score) == {"general": (123, 183), "hallucination": (541, 749), "reasoning": (239, 318)}
    assert score.overall.accuracy.accuracy == 0.7224
    assert score.macro == pytest.approx(0.7153332899262002, abs=1e-15)
    legacy = official_score(VL, rows, right, legacy=True)
    assert legacy.legacy
    assert counts(legacy) == {"general": (338, 484), "hallucination": (326, 448), "reasoning": (239, 318)}
    assert legacy.macro == pytest.approx(0.7258660019702043, abs=1e-15)
    assert legacy.overall == score.overall


def test_the_papers_own_counts_are_of_the_legacy_grouping() -> None:
    rows, right = vl_rows(
        hallucination=384, rlaif_v=150, rlhf_v=40, wildvision_battle=110, vlfeedback=9, mathverse=106, mmmu=100
    )
    legacy = official_score(VL, rows, right, legacy=True)
    assert counts(legacy) == {"general": (309, 484), "hallucination": (384, 448), "reasoning": (206, 318)}
    assert (legacy.overall.accuracy.right, legacy.overall.accuracy.counted) == (899, 1250)
    assert 100 * legacy.macro == pytest.approx(71.44, abs=0.01)  # printed: the mean of three rounded figures


def mm_rows() -> tuple[list[dict], list[bool]]:
    """(rows, wrong rows, ids, ids with a wrong row) of each category; the wrong rows of an id stand together."""
    table = {
        "mcq": (42, 2, 10, 2), "short": (34, 6, 10, 5), "long": (37, 4, 10, 3), "safety": (32, 8, 6, 5),
        "video": (25, 4, 10, 3),
    }  # fmt: skip
    rows, verdicts = [], []
    for category, (size, wrong, ids, failing) in table.items():
        numbers = [place % ids for place in range(size)]
        left = wrong
        for place, number in enumerate(numbers):
            bad = number < failing and left > 0 and (place < failing or left > 0)
            left -= bad
            rows.append({"id": f"{category}-{number}", "image": f"images/{category}/{number}.jpg"})
            verdicts.append(not bad)
        assert left == 0
    return rows, verdicts


def test_mm_rlhf_rewardbench_counts_pairs_and_whole_ids() -> None:
    rows, right = mm_rows()
    score = official_score(MM, rows, right)
    assert score.overall.accuracy.accuracy == 0.8588235294117647
    assert score.overall.accuracy_plus.accuracy == 0.6086956521739131
    assert {name: (group.accuracy.accuracy, group.accuracy_plus.accuracy) for name, group in score.groups.items()} == {
        "mcq": (0.9523809523809523, 0.8),
        "short": (0.8235294117647058, 0.5),
        "long": (0.8918918918918919, 0.7),
        "safety": (0.75, 0.16666666666666666),
        "video": (0.84, 0.7),
    }


def test_an_answer_without_a_verdict_counts_as_each_benchmark_says() -> None:
    vl = official_score(VL, [{"id": "mathverse_1"}, {"id": "mathverse_1"}], [True, None])
    assert (vl.overall.accuracy.counted, vl.overall.accuracy.accuracy, vl.without_verdict) == (1, 1.0, 1)
    mm = official_score(MM, [{"id": "a", "image": "mcq/1"}, {"id": "a", "image": "mcq/1"}], [True, None])
    assert (mm.overall.accuracy.accuracy, mm.overall.accuracy_plus.accuracy) == (0.5, 0.0)


def multimodal_rewardbench_script(answers: list[dict]) -> dict[str, tuple[int, int]]:
    """The rule of that benchmark's scripts/2_get_accuracy.py, in our words: one line per answer, in order."""
    random.seed(123)  # the script uses the module's own generator
    right: dict[str, list[bool]] = {}
    for answer in answers:
        text = answer["output"]
        chosen = "A" if "[[A]]" in text else "B" if "[[B]]" in text else "A" if random.random() < 0.5 else "B"
        name, category = answer["ID"].lower(), answer["Meta"]["Category"]
        if category == "safety":
            category = "safety/bias" if name.startswith("pairs") else "safety/toxicity"
        if category == "reasoning":
            category = "reasoning/math" if name.startswith("math") else "reasoning/coding"
        for group in ("all", category):
            right.setdefault(group, []).append(chosen == answer["Label"])
    return {group: (sum(found), len(found)) for group, found in right.items()}


def test_multimodal_rewardbench_equals_its_own_script_on_recorded_answers() -> None:
    """As many rows as the public subset has; a tenth of the answers without a verdict, some with both."""
    kinds = [
        ("general/correctness", "nocaps", 623), ("general/preference", "visitbench", 654), ("knowledge", "mmmu", 630),
        ("reasoning", "MathVista", 514), ("reasoning", "EMMA-coding", 584), ("safety", "PAIRS", 508),
        ("vqa", "seedbench", 1198),
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    said = ["I choose [[A]].", "Final verdict: [[B]]", "None", "Not [[B]] but [[A]], no: [[B]]", "[[C]] or [[a]]"]
    rows, texts = [], []
    for category, source, size in kinds:
        for number in range(size):
            better = "Output2" if draw.random() < 0.5 else "Output1"
            rows.append({"ID": f"{source}_{number}", "Category": category, "Better": better})
            texts.append(said[draw.choice(5, p=[0.5, 0.3, 0.07, 0.1, 0.03])])
    answers = [
        {"ID": row["ID"], "Label": "B" if row["Better"] == "Output2" else "A", "Meta": row, "output": text}
        for row, text in zip(rows, texts, strict=True)
    ]
    read = verdict_reader("multimodal-rewardbench")
    labels = [2 if row["Better"] == "Output2" else 1 for row in rows]
    choices = [read(text) for text in texts]
    right = [None if choice is None else choice == label for choice, label in zip(choices, labels, strict=True)]
    score = official_score(MRB, rows, right)
    whole = score.overall.accuracy
    assert (len(rows), score.without_verdict) == (4711, sum(text in (said[2], said[4]) for text in texts))
    assert {**counts(score), "all": (whole.right, whole.counted)} == multimodal_rewardbench_script(answers)


def test_multimodal_rewardbench_splits_safety_and_reasoning_by_id() -> None:
    rows = [
        {"ID": "PAIRS_1", "Category": "safety"},
        {"ID": "hateful_2", "Category": "safety"},
        {"ID": "MATH-V_3", "Category": "reasoning"},
        {"ID": "code_4", "Category": "reasoning"},
        {"ID": "x", "Category": "general/correctness"},
    ]
    score = official_score(MRB, rows, [True, False, True, False, True])
    assert counts(score) == {
        "general/correctness": (1, 1), "reasoning/coding": (0, 1), "reasoning/math": (1, 1), "safety/bias": (1, 1),
        "safety/toxicity": (0, 1),
    }  # fmt: skip
    assert score.macro == pytest.approx(0.6)


def test_a_judge_that_always_says_1_has_no_skill_in_both_orders() -> None:
    rows = [{"id": i} for i in range(50)]
    ours = both_orders_score(rows, [True] * 50, [False] * 50)
    assert (ours.better_first.mean, ours.better_second.mean, ours.mean.mean) == (1.0, 0.0, 0.5)
    assert (ours.agreement.mean, ours.agreement_pairs) == (0.0, 50)


def test_rows_of_one_id_are_one_item() -> None:
    """Ten equal rows of each id tell no more than one does."""
    right = [i % 3 != 0 for i in range(40)]
    single = both_orders_score([{"id": i} for i in range(40)], right, right)
    repeated = both_orders_score([{"id": i // 10} for i in range(400)], [right[i // 10] for i in range(400)], [
        right[i // 10] for i in range(400)
    ])  # fmt: skip
    assert repeated.mean.mean == pytest.approx(single.mean.mean)
    assert repeated.mean.high - repeated.mean.low > 0.9 * (single.mean.high - single.mean.low)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 verdicts for 2 rows"):
        official_score(VL, [{"id": "a"}, {"id": "b"}], [True])
    with pytest.raises(ValueError, match="no legacy grouping"):
        official_score(MM, [{"id": "a", "image": "mcq/1"}], [True], legacy=True)
    with pytest.raises(ValueError, match=r"no category .* 'other/1'"):
        official_score(MM, [{"id": "a", "image": "other/1"}], [True])
    with pytest.raises(ValueError, match="per row and order"):
        both_orders_score([{"id": "a"}], [True], [])
