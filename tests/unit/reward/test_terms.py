"""What a reward is the sum of: today's terms bit for bit, agreement with oneself, and functions of the user's."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.reward.terms import TermFunctions, TermInput, agreements, own_terms, reward_of
from megatron_r1reward.types import Label, Preference, Prompt, Rollout
from megatron_r1reward.user_parts import PartError


def formula(f: float, a: float, c: float, format_weight: float, consistency_weight: float) -> float:
    """R as it stood in the code before terms could be replaced."""
    return format_weight * f + (1.0 * a + consistency_weight * (a * c))


@pytest.mark.parametrize("written", [False, True])
def test_the_default_terms_give_the_formula_bit_for_bit(written: bool) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        f, a, c = rng.choice((0.0, 1.0)), rng.choice((0.0, 1.0)), rng.choice((-1.0, 0.0, 1.0, rng.random()))
        of_format, of_consistency = rng.choice((0.5, rng.random(), 0.1)), rng.choice((0.5, rng.random(), 0.7))
        section = RewardSection(format_weight=of_format, consistency_weight=of_consistency)
        if written:
            weights = {"format": of_format, "result": 1.0, "consistency": of_consistency}
            section = RewardSection(terms=[{"name": name, "weight": weight} for name, weight in weights.items()])
        assert reward_of(own_terms(f, a, c), section).hex() == formula(f, a, c, of_format, of_consistency).hex()


def rollout(
    answer: int | None, *, swapped: bool, label: Label | None = None, sample: int = 0, pair: str = "p"
) -> Rollout:
    prompt = Prompt(
        id=f"{pair}/{'21' if swapped else '12'}/0", preference_id=pair, token_ids=(1,), image_paths=("a.png",),
        label=label, swapped=swapped, group=f"{pair}/0",
    )  # fmt: skip
    return Rollout(
        prompt=prompt, sample_index=sample, token_ids=(1, 2), log_probs=(0.0, 0.0),
        text=f"<think>a</think><answer>{answer or ''}</answer>", finish_reason="stop", weight_spans=(),
    )  # fmt: skip


def agreed(*rollouts: Rollout, left_out: tuple[int, ...] = ()) -> list[float | None]:
    answers: list[Any] = [{"1": 1, "2": 2}.get(one.text[-10]) for one in rollouts]
    return agreements([one.prompt for one in rollouts], answers, [i in left_out for i in range(len(rollouts))])


def test_agreement_is_the_share_of_the_other_order_that_names_the_same_response() -> None:
    first = [rollout(answer, swapped=False, sample=i) for i, answer in enumerate((1, 1, 2, None))]
    second = [rollout(answer, swapped=True, sample=i) for i, answer in enumerate((2, 2, 2, 1))]
    # In the second order, 2 is the response that is 1 in the first.
    assert agreed(*first, *second) == [0.75, 0.75, 0.25, 0.0, 0.5, 0.5, 0.5, 0.25]
    always_first = [rollout(1, swapped=swapped) for swapped in (False, True)]
    assert agreed(*always_first) == [0.0, 0.0]
    others = [rollout(2, swapped=swapped, pair="q") for swapped in (False, True)]
    assert agreed(*first, *second, *others)[:8] == agreed(*first, *second), "pairs do not mix"


def test_without_responses_of_the_other_order_there_is_no_agreement() -> None:
    one, other = rollout(1, swapped=False), rollout(2, swapped=True)
    assert agreed(one) == [None]
    assert agreed(one, other, left_out=(1,)) == [None, 1.0]


def test_pairs_without_a_label_earn_format_and_agreement_only() -> None:
    section = RewardSection(use_judge=False, agreement_weight=0.25)
    rollouts = [
        rollout(1, swapped=False), rollout(2, swapped=True), rollout(None, swapped=True, sample=1),
        rollout(1, swapped=False, label=1, pair="q"), rollout(1, swapped=True, label=2, pair="q"),
        rollout(1, swapped=False, pair="alone"),
    ]  # fmt: skip
    scored, counts = RewardScorer(section, None).score(rollouts)
    assert [one.reward for one in scored] == [0.5 + 0.25 * 0.5, 0.75, 0.5, 1.5, 0.5, 0.5]
    assert [one.result_reward for one in scored] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], "no answer is not the right one"
    assert [one.masked for one in scored] == [False] * 5 + [True], "there was nobody to agree with"
    assert counts["unlabelled"] == 4
    assert scored[0].terms == {"agreement": 0.5}


ROWS = [
    Preference(id="p", question="Which?", responses=("x", "y"), label=None, image_paths=(), metadata={"source": "s"})
]


def section_of(tmp_path: Path, source: str, name: str = "mine") -> RewardSection:
    path = tmp_path / "rewards.py"
    path.write_text(source)
    terms = [{"name": "format", "weight": 0.5}, {"name": "mine", "weight": 2.0, "function": f"{path}:{name}"}]
    return RewardSection(use_judge=False, terms=terms)


def test_a_function_sees_the_responses_of_a_step_and_is_weighed(tmp_path: Path) -> None:
    source = (
        "import numpy as np\n"
        "def mine(rows):\n"
        "    global seen\n"
        "    seen = rows\n"
        "    return np.array([row.sample + row.tokens / 10 for row in rows], dtype=np.float32)\n"
    )
    scorer = RewardScorer(section_of(tmp_path, source), None)
    scorer.show(ROWS)
    scored, _ = scorer.score([rollout(1, swapped=False), rollout(2, swapped=True, sample=3)])
    assert [one.terms["mine"] for one in scored] == [float(np.float32(0.2)), float(np.float32(3.2))]
    assert [one.reward for one in scored] == [0.5 + 2 * one.terms["mine"] for one in scored]
    first, second = scorer.rules.functions.functions["mine"].__globals__["seen"]
    assert (first.question, first.responses, first.answer, first.label) == ("Which?", ("x", "y"), 1, None)
    assert (second.responses, second.metadata, second.well_formed) == (("y", "x"), {"source": "s"}, True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return [1.0 / (row.sample - 1) for row in rows]",
         "failed at row 'p' (prompt 'p/21/0', sample 1) (line 2: ZeroDivisionError: float division by zero): mend the"),
        ("return [0.0, float('nan')]",
         "returned nan for row 'p' (prompt 'p/21/0', sample 1): return a finite number for every row"),
        ("return [None, 1.0]", "returned None for row 'p' (prompt 'p/12/0', sample 0): return a finite number"),
        ("return ['1', '2']", "returned '1' for row 'p'"),
        ("return [1.0]", "returned 1 values for 2 rows: return a list of 2 numbers, one per row"),
        ("return None", "returned None for 2 rows: return a list of 2 numbers"),
        ("return 1.0", "returned 1.0 for 2 rows: return a list"),
        ("assert len(rows) < 2; return [0.0]", "failed at a batch of 2 rows (line 2: AssertionError): mend the"),
    ],
)  # fmt: skip
def test_what_a_function_does_wrong_is_one_line(body: str, reason: str, tmp_path: Path) -> None:
    scorer = RewardScorer(section_of(tmp_path, f"def mine(rows):\n    {body}\n"), None)
    with pytest.raises(PartError) as error:
        scorer.score([rollout(1, swapped=False), rollout(2, swapped=True, sample=1)])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"reward.terms 'mine' '{tmp_path}/rewards.py:mine' ")
    assert reason in message


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("def mine(rows:\n", "mine", r"does not run \(line 1: '\(' was never closed\): mend it"),
        ("import nowhere_at_all\n", "mine", "does not run .line 1: ModuleNotFoundError: No module named"),
        ("def mine(rows): ...\ndef other(rows): ...\n", "yours", "has no function 'yours': it has mine, other"),
        ("x = 1\n", "x", "has no function 'x': it has none"),
    ],
)
def test_what_cannot_be_loaded_is_said_before_the_run(source: str, name: str, reason: str, tmp_path: Path) -> None:
    section = section_of(tmp_path, source, name)
    with pytest.raises(ValueError, match=reason) as error:
        TermFunctions.load(section)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    section = section_of(tmp_path, "")
    (tmp_path / "rewards.py").unlink()
    with pytest.raises(
        ValueError, match=r"reward.terms 'mine'.*cannot be read \(No such file or directory\): check the path"
    ):
        RewardScorer(section, None)


def test_no_function_is_asked_about_no_rows(tmp_path: Path) -> None:
    functions = TermFunctions.load(section_of(tmp_path, "def mine(rows):\n    return 1 / 0\n"))
    assert functions.values([]) == {"mine": []}
    row = TermInput(
        text="", reasoning="", answer=1, label=1, well_formed=True, finish_reason="stop", tokens=1,
        verdict="not_asked", agreement=None, question="", responses=("", ""), swapped=False, image_paths=(),
        metadata={}, row_id="p", prompt_id="p", sample=0,
    )  # fmt: skip
    with pytest.raises(PartError, match="ZeroDivisionError"):
        functions.values([row, replace(row, sample=1)])
