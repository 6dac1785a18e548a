"""Images inside responses: from published rows to packed pixels, every image where its text shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.importing import import_preferences
from megatron_r1reward.data.packing import Packer
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.data.preference import read_preferences, read_sft_examples
from megatron_r1reward.data.prompt import PromptBuilder, messages_of
from megatron_r1reward.data.stage_data import RowLimits
from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions
from megatron_r1reward.types import Preference

# Another number of tokens each.
SIZES = {"asked": (56, 56), "good": (112, 56), "better": (112, 112), "bad": (168, 112)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        Image.new("RGB", size, (60 * number, 0, 255 - 60 * number)).save(tmp_path / f"{name}.png")
    return tmp_path


def part(name: str) -> dict[str, str]:
    return {"type": "image", "image": f"{name}.png"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": list(parts)}]


# The same pair in the forms that name a response's images; what the good response shows comes in two images.
FORMS: dict[str, dict[str, Any]] = {
    "parts of turns": {
        "prompt": [{"role": "user", "content": [part("asked"), text("Draw this at night.")]}],
        "chosen": turn(text("First"), part("good"), text("then"), part("better")), "rejected": turn(part("bad")),
    },
    "columns": {
        "prompt": "Draw this at night.", "image": "asked.png", "chosen": "First<image>then<image>", "rejected": "",
        "chosen_images": ["good.png", "better.png"], "rejected_image": "bad.png",
    },
    "a conversation": {
        "messages": [{"role": "user", "content": [part("asked"), text("Draw this at night.")]},
                     *turn(text("First"), part("good"), text("then"), part("better"))],
        "rejected_response": "<image>", "rejected_images": ["bad.png"],
    },
    "pairwise": {
        "question": "Draw this at night.", "image": "asked.png", "response_a": "<image>", "response_b":
        "First<image>then<image>", "winner": "b", "response_a_images": ["bad.png"],
        "response_b_images": ["good.png", "better.png"],
    },
}  # fmt: skip


def imported(folder: Path, row: dict[str, Any], **options: Any) -> Preference:
    (folder / "rows.json").write_text(json.dumps([row]))
    (found,) = import_preferences(folder / "rows.json", folder / "out", image_root=folder, **options).preferences
    return found


def shown(messages: Any, paths: tuple[str, ...]) -> list[str]:
    """What stands in a turn, images by their names."""
    names = iter(paths)
    return [part["text"] if part["type"] == "text" else Path(next(names)).stem for part in messages[0]["content"]]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_row_and_is_read_back(folder: Path, form: str) -> None:
    row = imported(folder, FORMS[form], order="stored")
    good = row.label - 1
    assert (row.responses[good], row.responses[1 - good]) == ("First<image>then<image>", "<image>")
    assert (row.question, row.response_images) == ("Draw this at night.", ((2, 1), (1, 2))[good])
    assert row.question_images == 1
    parts = shown(messages_of(row), row.image_paths)
    order = ["asked", "First", "good", "then", "better", "bad"] if good == 0 else [
        "asked", "bad", "First", "good", "then", "better"
    ]  # fmt: skip
    assert [one for one in ("\n".join(parts)).split("\n") if one.strip() in order] == order
    (again,) = read_preferences(folder / "out" / "preferences.jsonl", image_root=folder).preferences
    assert (again.responses, again.image_paths, again.response_images) == (
        row.responses, row.image_paths, row.response_images,
    )  # fmt: skip
    assert ContentKeys().row(again) == ContentKeys().row(row)


def test_the_images_change_places_with_their_responses(folder: Path) -> None:
    row = imported(folder, FORMS["columns"], order="stored")
    other = row.exchanged()
    assert [Path(path).stem for path in other.image_paths] == ["asked", "bad", "good", "better"]
    assert (other.label, other.response_images, other.exchanged()) == (2, (1, 2), row)
    drawn = imported(folder, FORMS["pairwise"], order="drawn")  # stands the other way round in the source
    assert (drawn.label, [Path(path).stem for path in drawn.image_paths]) == (1, ["asked", "good", "better", "bad"])


def test_the_trainer_sees_each_image_where_the_server_is_sent_it(folder: Path, tiny_folder: Path) -> None:
    """The n-th placeholder has as many tokens as the n-th image of the prompt, which a server gets in that order."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    images = ImageProcessor(tiny_folder, min_pixels=3136, max_pixels=501_760)
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    packer = Packer(image_processor=images, image_token_id=image_id, positions=mrope_positions, pad_token_id=0,
                    token_budget=4096, device=torch.device("cpu"))  # fmt: skip
    row = imported(folder, FORMS["columns"], order="stored")
    for swapped in (False, True):
        prompt = PromptBuilder(tokenizer, 4096).build(row, swapped=swapped)
        names = [Path(path).stem for path in prompt.image_paths]
        assert names == (["asked", "bad", "good", "better"] if swapped else ["asked", "good", "better", "bad"])
        before = tokenizer.decode(prompt.token_ids).split("<|image_pad|>")
        assert "First" in before[2 if swapped else 1]
        then = before[3 if swapped else 2].replace("<|vision_start|>", "").replace("<|vision_end|>", "")
        assert then.strip() == "then"
        batch = packer.pack([packer.sequence(prompt, [1, 2])], [0])
        assert batch.pixel_values is not None
        expected = torch.cat([images(path).pixel_values for path in prompt.image_paths])
        assert torch.equal(batch.pixel_values, expected)
        runs = "".join("1" if token == image_id else "0" for token in batch.input_ids[0].tolist()).split("0")
        tokens = [images.num_tokens(images(str(folder / f"{name}.png"))) for name in names]
        assert [len(run) for run in runs if run] == tokens == [{"asked": 4, "good": 8, "better": 16, "bad": 24}[name]
                                                               for name in names]  # fmt: skip
    limits = RowLimits(model=tiny_folder, prompt_tokens=4096, sequence_tokens=None, sequence_key="", response_tokens=1,
                       min_pixels=3136, max_pixels=501_760, folders=None)  # fmt: skip
    assert limits.prompt_length(row) == len(prompt.token_ids)


def test_supervised_rows_of_the_set_show_them_in_place(folder: Path) -> None:
    imported(folder, FORMS["columns"], order="stored")
    path = folder / "out" / "preferences.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "response": "<answer>1</answer>"}))
    (example,) = read_sft_examples(path, image_root=folder).examples
    kinds = [part["type"] for part in example.messages[0]["content"]]
    assert kinds == ["image", "text", "image", "text", "image", "text", "image", "text"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen_images": None}, "a response shows an image (<image>) that the row does not name"),
        ({"chosen_images": ["good.png"]}, "a response shows 2 <image>, the row names 1 images for it"),
        ({"rejected_image": "gone.png"}, "gone.png' is missing"),
    ],
)
def test_what_is_not_named_is_set_aside_with_its_reason(folder: Path, change: dict[str, Any], reason: str) -> None:
    rows = [{**FORMS["columns"], **change}, FORMS["columns"]]
    (folder / "rows.json").write_text(json.dumps(rows))
    assert import_preferences(folder / "rows.json", folder / "out", image_root=folder).rows == 1
    (refused,) = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert reason in refused["reason"]


def test_rows_of_ours_must_agree_with_their_texts(folder: Path) -> None:
    row = {"question": "q", "response_1": "<image>", "response_2": "no", "answer": "1", "images": ["good.png"]}
    cases = [
        ({"response_images": [1, 0]}, None),
        ({"response_images": [2, 0]}, "response 1 shows 1 <image>, response_images says 2"),
        ({"response_images": [1]}, "not how many images response 1"), ({}, None),  # a text that says <image>
        ({"response_images": [1, 0], "images": []}, "the responses show 1 images, the row has 0"),
    ]  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, **change, "id": str(i)}) + "\n" for i, (change, _) in enumerate(cases)))
    result = read_preferences(path, image_root=folder)
    assert [(row.id, row.response_images) for row in result.preferences] == [("0", (1, 0)), ("3", (0, 0))]
    assert result.quarantine_path is not None
    reasons = [json.loads(line)["reason"] for line in result.quarantine_path.read_text().splitlines()]
    for reason, (_, expected) in zip(reasons, [case for case in cases if case[1]], strict=True):
        assert expected in reason
