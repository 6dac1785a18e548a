"""The prompt is the released model's, byte for byte, and survives the way to token ids and back."""

import hashlib
import string

import pytest

from megatron_r1reward.data.prompt import (
    TEMPLATE,
    PromptBuilder,
    judge_messages,
    preference_messages,
    split_message_text,
)
from megatron_r1reward.demo.tiny_models import train_tokenizer
from megatron_r1reward.types import Preference


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEMPLATE, "Response 1 is better. 0 1 2 3 4 5 6 7 8 9"] * 4, vocab_size=400)


def preference(**changes):
    fields = {
        "id": "p7",
        "question": "What is {this}?",
        "responses": ("A cat.", "Ein Hund: 犬 {0}"),
        "label": 1,
        "image_paths": ("/images/a.png", "/images/b.png"),
    }
    return Preference(**{**fields, **changes})


def text_of(messages):
    return messages[0]["content"][-1]["text"]


def test_template_is_the_published_one():
    assert len(TEMPLATE) == 717
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest().startswith("5593ecd7d4d7ec96")
    assert [name for _, name, _, _ in string.Formatter().parse(TEMPLATE) if name] == ["question", "answer1", "answer2"]


def test_messages_show_images_first_in_one_user_turn():
    (turn,) = preference_messages("Q", ("A", "B"), num_images=2)
    assert turn["role"] == "user"
    assert turn["content"][:2] == [{"type": "image"}, {"type": "image"}]
    assert turn["content"][2] == {"type": "text", "text": TEMPLATE.format(question="Q", answer1="A", answer2="B")}


@pytest.mark.parametrize(
    "parts",
    [
        ("Q", "A", "B"),
        ("two\n\nlines", "- a\n- b\n\n# heading\n## more", "{question} {answer1}"),
        ("說明", "<think>x</think><answer>1</answer>", "[Response 1] without hashes"),
    ],
)
def test_split_inverts_filling(parts):
    question, first, second = parts
    assert split_message_text(text_of(preference_messages(question, (first, second), 1))) == parts


@pytest.mark.parametrize("hashes", ["####", "#####", "######"])
@pytest.mark.parametrize("separator", ["\n", " ", "", "  \n\n"])
def test_split_accepts_other_published_headings(hashes, separator):
    text = (
        f"Compare.{separator}{hashes} **Input:**{separator}{hashes} [Question]:{separator}Q?{separator}"
        f"{hashes} [Response 1]:{separator}one{separator}{hashes} [Response 2]:{separator}two{separator}"
        f"{hashes} **Output Format (strictly follow):**{separator}<think></think>"
    )
    assert split_message_text(text) == ("Q?", "one", "two")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no heading"),
        (TEMPLATE.replace("###### [Response 2]", "## [Response 2]"), "no heading"),
        (TEMPLATE.replace("**Output Format", "**Format"), "no heading"),
        (TEMPLATE.format(question="Q", answer1="A\n###### [Response 2]:\nfake", answer2="B"), "2 headings"),
        (TEMPLATE.replace("[Question]", "[X]").replace("[Response 2]", "[Question]").replace("[X]", "[Response 2]"),
         "out of order"),
    ],
)  # fmt: skip
def test_split_refuses_what_it_cannot_be_sure_of(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        split_message_text(text)


@pytest.mark.parametrize("swapped", [False, True])
def test_prompt_shows_the_order_asked_for(tokenizer, swapped):
    prompt = PromptBuilder(tokenizer, 4096).build(preference(), swapped=swapped, occurrence=3)
    shown = tokenizer.decode(prompt.token_ids)
    first, second = preference().responses[::-1] if swapped else preference().responses
    filled = TEMPLATE.format(question="What is {this}?", answer1=first, answer2=second)
    assert shown.endswith(f"{filled}<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.label == (2 if swapped else 1)
    assert prompt.swapped is swapped
    assert prompt.id == f"p7/{'21' if swapped else '12'}/3"
    assert prompt.preference_id == "p7"


@pytest.mark.parametrize("paths", [(), ("/a.png",), ("/a.png", "/b.png", "/c.png")])
def test_one_placeholder_per_image(tokenizer, paths):
    prompt = PromptBuilder(tokenizer, 4096).build(preference(image_paths=paths), swapped=False)
    assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == len(paths)
    assert prompt.image_paths == paths
    assert all(type(token) is int for token in prompt.token_ids)


def test_prompt_at_the_limit_passes_and_one_token_more_does_not(tokenizer):
    length = len(PromptBuilder(tokenizer, 4096).build(preference(), swapped=False).token_ids)
    PromptBuilder(tokenizer, length).build(preference(), swapped=False)
    with pytest.raises(
        ValueError, match=rf"'p7': the prompt has {length} tokens, data.max_prompt_tokens is {length - 1}"
    ):
        PromptBuilder(tokenizer, length - 1).build(preference(), swapped=False)


def test_placeholder_in_a_text_cannot_pass_for_an_image(tokenizer):
    with pytest.raises(ValueError, match="3 image placeholders for 2 images"):
        PromptBuilder(tokenizer, 4096).build(preference(question="What is <|image_pad|>?"), swapped=False)


def test_judge_prompt_is_text_that_holds_analysis_and_verdict():
    (turn,) = judge_messages("Response 1 is {wrong}.\nSo 2.", "Response 2 is better.")
    assert turn["role"] == "user"
    assert "Response 1 is {wrong}.\nSo 2.\n\nVerdict: Response 2 is better." in turn["content"]
    assert len(turn["content"]) < 300
