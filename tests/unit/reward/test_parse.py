"""Which responses are well formed, and which verdict they hold; nothing is guessed."""

import pytest

from megatron_r1reward.reward.rules import parse_response


@pytest.mark.parametrize(
    ("text", "well_formed", "answer"),
    [
        ("<think>a</think><answer>1</answer>", True, 1),
        ("  \n<think>a\nb</think><answer> 2\n</answer>\n", True, 2),
        ("<think></think><answer>2</answer>", True, 2),
        # The format rule does not look inside <answer>.
        ("<think>a</think><answer>3</answer>", True, None),
        ("<think>a</think><answer></answer>", True, None),
        ("<think>a</think><answer>Response 1</answer>", True, None),
        ("<think>a</think><answer>1.0</answer>", True, None),
        ("<think>a</think><answer>01</answer>", True, None),
        ("<think>a</think><answer>\N{FULLWIDTH DIGIT ONE}</answer>", True, None),
        ("<think>a</think><answer>1 2</answer>", True, None),
        ("<think>a</think><answer>$1$</answer>", True, None),
        # Anything between, before or after the two blocks is malformed; the answer counts all the same.
        ("<think>a</think> <answer>1</answer>", False, 1),
        ("<think>a</think>\n<answer>1</answer>", False, 1),
        ("So: <think>a</think><answer>1</answer>", False, 1),
        ("<think>a</think><answer>1</answer>.", False, 1),
        ("<answer>1</answer>", False, 1),
        ("a</think><answer>1</answer>", False, 1),
        ("<Think>a</Think><answer>1</answer>", False, 1),
        # Repeated opening tags are malformed; the first complete answer counts.
        ("<think>a</think><answer>1</answer><answer>2</answer>", False, 1),
        ("<think>a<think>b</think><answer>1</answer>", False, 1),
        ("<think>a <answer>2</answer></think><answer>1</answer>", False, 2),
        # Repeated closing tags are not counted (released rule).
        ("<think>a</think>b</think><answer>2</answer>", True, 2),
        # Control tokens are no text.
        ("<think>a<|im_start|></think><answer>1</answer>", False, 1),
        ("<think>a</think><answer>1</answer><|endoftext|><|endoftext|>", False, 1),
        # No free-text fallback.
        ("Response 1 is better. The answer is 1", False, None),
        ("<think>a</think><answer>1", False, None),
        ("<think>a</think>1</answer>", False, None),
        ("1", False, None),
        ("", False, None),
    ],
)
def test_table(text: str, well_formed: bool, answer: int | None) -> None:
    parsed = parse_response(text)
    assert (parsed.well_formed, parsed.answer) == (well_formed, answer)


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>one\ntwo</think><answer>1</answer>", "one\ntwo"),
        ("before <think>one</think> after <answer>1</answer> late", "before one after"),
        ("<think>never closed", "never closed"),
        ("<answer>1</answer>", ""),
        ("", ""),
    ],
)
def test_reasoning(text: str, reasoning: str) -> None:
    assert parse_response(text).reasoning == reasoning


@pytest.mark.timeout(60)  # what backtracks takes hours
@pytest.mark.parametrize("unit", ["<think>", "</think><answer>", "<answer>", "</think>", "<think></think><answer>"])
def test_repetitive_garbage_is_parsed_in_no_time(unit: str) -> None:
    assert not parse_response(unit * 20_000).well_formed
