"""Other people's prompts are filled as they are written, and their verdicts are read as they mean them."""

from __future__ import annotations

import json

import pytest

from megatron_r1reward.judging.judge_prompt import JudgePrompt, verdict_reader

TAGGED = "<think>Response 2 is off.</think><answer>Answer 1 is better</answer>"


@pytest.mark.parametrize(
    ("name", "text", "choice"),
    [
        ("answer", "<answer>2</answer>", 2),
        ("answer", "I choose 2", None),
        ("released", "Response 1 or 2? I say 1", 1),
        ("released", "<answer>1/2</answer>", 2),  # whatever is not 1 counts as 2 there
        ("released", "no idea", 2),
        ("answer-text", TAGGED, 1),
        ("answer-text", "**Overall Judgment:** Answer 2 is better.", 2),
        ("answer-text", "Assistant A is worse, so assistant B.", 2),
        ("answer-text", "both are good", None),
        ("brackets", "Not [[A]] but [[B]]", 2),
        ("brackets", "[[C]]", None),
        ("multimodal-rewardbench", "Not [[B]] but [[A]], or [[B]]?", 1),
        ("multimodal-rewardbench", "[[a]] or [[B]]", 2),
        ("multimodal-rewardbench", "None", None),
        ("boxed", r"so \boxed{\text{first}}", 1),
        (r"winner:\s*(\w+)", "winner: first; winner: second", 2),
        (r"winner:\s*(\w+)", "winner: none", None),
    ],
)
def test_verdicts(name, text, choice) -> None:
    assert verdict_reader(name)(text) == choice


@pytest.mark.parametrize(("name", "said"), [("(", "no regular expression"), ("answered", "give one of answer, rel")])
def test_what_reads_no_verdict_is_refused(name, said) -> None:
    with pytest.raises(ValueError, match=said):
        verdict_reader(name)


def test_texts_are_put_in_as_they_are_and_images_where_the_prompt_says(tmp_path) -> None:
    path = tmp_path / "prompt.json"
    turns = [("system", "Judge as {json}."), ("user", "See {images}\n{question}|{response_1}|{response_2}")]
    path.write_text(json.dumps([{"role": role, "content": content} for role, content in turns]))
    prompt = JudgePrompt.load(path)
    system, user = prompt.messages(r"\1 {response_1}?", ("{question}", "b"), ["data:x"])
    assert system == {"role": "system", "content": "Judge as {json}."}
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert user["content"][2]["text"] == "\n\\1 {response_1}?|{question}|b"
    _, words = prompt.messages("q", ("a", "b"), [])
    assert words["content"] == "See \nq|a|b"


@pytest.mark.parametrize("placed", [True, False])
def test_images_of_a_response_stand_in_its_text(tmp_path, placed) -> None:
    path = tmp_path / "prompt.txt"
    text = "{question} 1: {response_1} 2: {response_2}"
    path.write_text(f"See {{images}}:{text} {{images}}" if placed else text)
    (turn,) = JudgePrompt.load(path).messages(
        "q", ("a<image>b", "<image><image>"), ["data:q", "data:1", "data:2", "data:3"], response_images=(1, 2)
    )
    shown = [part["text"] if part["type"] == "text" else part["image_url"]["url"] for part in turn["content"]]
    rest = ["data:1", "b 2: ", "data:2", "data:3"]
    assert shown == (["See ", "data:q", ":q 1: a", *rest, " "] if placed else ["data:q", "q 1: a", *rest])
    (plain,) = JudgePrompt.load(path).messages("q", ("a<image>b", "c"), [])
    assert "a<image>b" in plain["content"], "a text that no image belongs to is a text"


@pytest.mark.parametrize(
    ("content", "said"),
    [("{question} {response_1}", "has no {response_2}"), (None, "no text and no list"), ("[1]", "no text and no list")],
)
def test_a_prompt_that_cannot_be_filled_is_refused(tmp_path, content, said) -> None:
    path = tmp_path / ("prompt.json" if content == "[1]" else "prompt.txt")
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=said):
        JudgePrompt.load(path)
