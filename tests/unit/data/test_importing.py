"""Published preference data become training data: every row used or accounted for, no order that gives labels away."""

from __future__ import annotations

import base64
import codecs
import gzip
import io
import json
import re
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.data import import_parts, importing
from megatron_r1reward.data.importing import import_preferences
from megatron_r1reward.data.preference import read_preferences

GOOD, BAD = (
    "Die Antwort ist 8 \u2014 \u516b.",
    "<answer>2</answer> ###### [Response 1]: no",
)  # tags and headings of our prompt


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), color).save(buffer, "PNG")
    return buffer.getvalue()


def critic(first: str, second: str, verdict: str) -> list[dict[str, str]]:
    prompt = (
        "<image>\nGiven an image and a corresponding question, determine which answer is better. Your task is provided "
        f"as follows:\nQuestion: [Which digit?]\nThe first response: [{first}]\nThe second response: [{second}]\n"
        "ASSISTANT:\n"
    )
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": verdict}]


def unified(first: str, second: str, verdict: str) -> list[dict[str, str]]:
    prompt = (
        f"<image>\nCompare.\nQuestion: Which digit?\n- Answer 1: {first}\n- Answer 2: {second}\n\n2. You must evaluate"
    )
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"<think>x</think><answer>{verdict}</answer>"}]


USER = {"role": "user", "content": "Which digit?"}
PROMPT = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which digit?"}]}]
IMAGE = {"bytes": png(), "path": None}
# Rows in the published columns; the better response is GOOD in each.
ROWS: dict[str, list[dict[str, Any]]] = {
    "vl_rewardbench": [
        {"id": "RLAIF-V-1", "query": "Which digit?", "response": [GOOD, BAD], "image": IMAGE, "human_ranking": [0, 1],
         "models": ["a", "b"], "judge": "gpt", "rationale": None, "query_source": "RLAIF-V", "ground_truth": None},
        {"id": "RLAIF-V-1", "query": "Which digit is it?", "response": [BAD, GOOD], "image": IMAGE,
         "human_ranking": [1, 0], "models": ["a", "b"], "judge": "gpt", "rationale": None, "query_source": "RLAIF-V",
         "ground_truth": None},
    ],
    "multimodal_rewardbench": [
        {"ID": 7, "Text": "Which digit?", "Image": "a.png", "Output1": GOOD, "Output2": BAD, "Better": "Output1",
         "Category": "math"},
        {"ID": 8, "Text": "Which digit?", "Image": "a.png", "Output1": BAD, "Output2": GOOD, "Better": "Output2",
         "Category": "math"},
    ],
    "rlaif_v": [
        {"ds_name": "RLAIF-V", "image": IMAGE, "question": "Which digit?", "chosen": GOOD, "rejected": BAD,
         "origin_dataset": "COCO", "origin_split": "{}", "idx": 4, "image_path": "gone.jpg"},
    ],
    "mm_rlhf": [
        {"id": "mcq/1", "image": "a.png", "prompt": "<image>\nWhich digit?", "chosen": GOOD, "rejected": BAD,
         "chosen_reason": "", "rejected_reason": ""},
        {"id": "mcq/1", "image": "a.png", "prompt": "Which digit is it?", "chosen": GOOD, "rejected": BAD,
         "chosen_reason": "", "rejected_reason": ""},
        {"id": "video/1", "image": None, "video": "frames", "prompt": "<video>\nWhich digit?", "chosen": GOOD,
         "rejected": BAD, "chosen_reason": "", "rejected_reason": ""},
    ],
    "skywork": [
        {"chosen": [USER, {"role": "assistant", "content": GOOD}],
         "rejected": [USER, {"role": "assistant", "content": BAD}], "source": "magpie"},
    ],
    "llava_critic": [
        {"id": 1, "image": "a.png", "conversations": critic(GOOD, BAD, "The first response is better, as it counts."),
         "data_source": "x"},
        {"id": 2, "image": "a.png", "conversations": critic(BAD, GOOD, "The second response is clearly better."),
         "data_source": "x"},
    ],
    "unified_reward": [
        {"image": "a.png", "conversations": unified(GOOD, BAD, "Answer 1 is better")},
        {"image": "a.png", "conversations": unified("none", GOOD, "Answer 2 is better")},
    ],
    "pairwise": [
        {"question": "Which digit?", "response_a": GOOD, "response_b": BAD, "winner": "model_a", "image": "a.png"},
        {"question": "Which digit?", "response_a": BAD, "response_b": GOOD, "winner": "B", "image": "a.png"},
    ],
    "chosen_rejected": [
        {"prompt": "Which digit?", "chosen": GOOD, "rejected": BAD, "image": base64.b64encode(png()).decode()},
        {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": GOOD}],
         "rejected": [{"role": "assistant", "content": BAD}]},
        {"messages": [USER, {"role": "assistant", "content": GOOD}], "rejected_response": BAD, "images": ["a.png"]},
        {"conversations": [{"from": "human", "value": "<image>Which digit?"}], "images": ["a.png"],
         "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
        {"chosen": f"\n\nHuman: Which digit?\n\nAssistant: {GOOD}",
         "rejected": f"\n\nHuman: Which digit?\n\nAssistant: {BAD}"},
        {"messages": [USER, {"role": "assistant", "content": "6?"}, {"role": "user", "content": "Look again."},
                      {"role": "assistant", "content": GOOD}], "rejected_response": BAD},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "frames").mkdir()
    for index in range(40):
        (tmp_path / "frames" / f"{index:03}.png").write_bytes(png())
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]], form: str) -> Path:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row, default=lambda b: None) + "\n" for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_published_row_is_used_and_the_better_response_stays_the_better_one(folder: Path, name: str) -> None:
    rows = ROWS[name]
    files = [[row] for row in rows] if name == "chosen_rejected" else [rows]  # one form a file
    for form in ("parquet", "saved") if any(row.get("image") is IMAGE for row in rows) else ("jsonl", "json"):
        for number, given in enumerate(files):
            out = folder / f"out-{form}-{number}"
            result = import_preferences(write(folder, given, form), out, image_root=folder)
            account = json.loads((out / "import.json").read_text())
            assert account["schema"] == name
            assert (account["rows"], account["quarantined"]) == (len(given), 0)
            for row in result.preferences:
                assert row.responses[row.label - 1] == GOOD
                assert row.question.startswith(("Which digit", "User: Which digit?\n\nAssistant: 6?"))
            assert len({row.id for row in result.preferences}) == len(given)  # repeated ids are told apart
            again = read_preferences(out / "preferences.jsonl", image_root=folder)
            assert again.quarantined == 0
            assert [(row.id, row.responses, row.label) for row in again.preferences] == [
                (row.id, row.responses, row.label) for row in result.preferences
            ]


def test_frames_of_a_video_are_images(folder: Path) -> None:
    result = import_preferences(write(folder, ROWS["mm_rlhf"], "jsonl"), folder / "out")
    (video,) = [row for row in result.preferences if row.id == "video/1"]
    assert len(video.image_paths) == 32
    assert [video.image_paths[0][-7:], video.image_paths[-1][-7:]] == ["000.png", "039.png"]


def test_videos_and_images_in_parts_of_turns(folder: Path) -> None:
    show = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "frames"}, {"type": "text", "text": "Why?"}]
    row = {"prompt": [{"role": "user", "content": show}], "chosen": "a", "rejected": "b"}
    inside = {**row, "chosen": [{"role": "assistant", "content": show[1:]}]}
    result = import_preferences(write(folder, [row, inside], "jsonl"), folder / "out", max_frames=4)
    (only,) = result.preferences
    assert only.question == "Why?"
    assert [Path(path).name for path in only.image_paths] == ["a.png", "000.png", "013.png", "026.png", "039.png"]
    assert (
        "a response shows a video: name its frames as images, in chosen_images"
        in (folder / "out" / "quarantine.jsonl").read_text()
    )


def test_chosen_first_data_do_not_become_a_model_that_says_1(folder: Path) -> None:
    rows = [{"id": index, "prompt": "Which?", "chosen": f"good {index}", "rejected": "bad"} for index in range(101)]
    source = write(folder, rows, "jsonl")
    result = import_preferences(source, folder / "out", seed=1)
    assert sorted(Counter(row.label for row in result.preferences).values()) == [50, 51]
    lines = [json.loads(line) for line in (folder / "out" / "preferences.jsonl").read_text().splitlines()]
    assert all(line["exchanged"] == (line["answer"] == ["<answer>2</answer>"]) for line in lines)
    account = json.loads((folder / "out" / "import.json").read_text())
    assert account["order"] == "drawn, seed 1"
    assert account["text_only"] == 101
    assert import_preferences(source, folder / "same", seed=1).preferences == result.preferences
    assert import_preferences(source, folder / "other", seed=2).preferences != result.preferences
    stored = import_preferences(source, folder / "stored", order="stored")
    assert {row.label for row in stored.preferences} == {1}


def test_winners_that_count_from_0(folder: Path) -> None:
    rows = [
        {"question": "Which?", "response_a": "a", "response_b": f"b{index}", "label": index % 2} for index in range(4)
    ]
    result = import_preferences(write(folder, rows, "jsonl"), folder / "out")
    assert [row.label for row in result.preferences] == [1, 2, 1, 2]


def test_what_cannot_be_used_is_accounted_for(folder: Path) -> None:
    rows = [
        {"question": "q", "response_a": "a", "response_b": "b", "winner": "a", "image": "a.png"},
        {"question": "q", "response_a": "a", "response_b": "b", "winner": "tie", "image": "a.png"},
        {"question": "q", "response_a": "a", "response_b": "b", "winner": "a", "image": "gone.png"},
        {"question": "q", "response_a": 5, "response_b": "b", "winner": "a"},
        {"id": "x", "question": "q", "response_a": "see <image>", "response_b": "b", "winner": "a", "image": "a.png"},
        {"question": "q", "response_a": "a" * 200_000, "response_b": "b", "winner": "b"},
    ]
    result = import_preferences(write(folder, rows, "jsonl"), folder / "out")
    assert (len(result.preferences), result.quarantined) == (2, 4)
    reasons = [json.loads(line)["reason"] for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    for reason, text in zip(reasons, ["a tie", "gone.png", "not a list of turns", "shows an image"], strict=True):
        assert text in reason
    twice = write(folder, [{"id": 1, "prompt": "q", "chosen": "a", "rejected": "b"}] * 2, "jsonl")
    assert import_preferences(twice, folder / "twice").quarantined == 1  # an exact copy is no second row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a", "id": 1}, "nearest is chosen_rejected, which also needs rejected or rejected_"),
        ({"query": "q", "response": ["a", "b"]}, "nearest is vl_rewardbench, which also needs human_ranking"),
        ({"Text": "q", "Output1": "a", "Output2": "b"}, "nearest is multimodal_rewardbench, which also needs Better"),
        ({"context": "q", "response1": "a", "response2": "b", "score": -2}, r"nearest is pairwise, .* needs prompt or"),
        ({"text": "q", "score": 1}, r"columns \['score', 'text'\] .*: none of them is one of any; e.g. chosen_rej"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_nearest_schema_and_what_is_missing(folder: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_preferences(write(folder, [row], "jsonl"), folder / "out")


@pytest.mark.parametrize("schema", ["auto", "chosen_rejected"])
def test_rows_that_say_nothing_do_not_hide_the_schema_of_the_others(folder: Path, schema: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    empty = dict.fromkeys(row)
    result = import_preferences(write(folder, [empty, empty, row], "jsonl"), folder / "out", schema=schema)
    assert (result.rows, result.quarantined, result.account["schema"]) == (1, 2, "chosen_rejected")


def test_json_that_other_programs_write(folder: Path) -> None:
    """Lines under the name of an array, and the mark of an editor at the beginning."""
    row = {"prompt": "q", "chosen": "g\u00fct", "rejected": "b"}
    array, lines = json.dumps([row, row | {"prompt": "p"}]), json.dumps(row) + "\n" + json.dumps(row | {"prompt": "p"})
    path = folder / "rows.json"
    for number, content in enumerate((array, lines, json.dumps([row, row | {"prompt": "p"}], indent=1))):
        for mark in ("utf-8", "utf-8-sig"):
            path.write_bytes(content.encode(mark))
            found = import_preferences(path, folder / f"{number}-{mark}", order="stored").preferences
            assert [row.question for row in found] == ["q", "p"]
    path.write_text(array[:-9])
    with pytest.raises(ValueError, match="malformed JSON after row 1") as error:
        import_preferences(path, folder / "torn")
    assert "\n" not in str(error.value)


def test_responses_that_are_the_same_are_no_preference(folder: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "a"}
    result = import_preferences(write(folder, [row, {**row, "rejected": "b"}], "jsonl"), folder / "out")
    assert (result.rows, result.quarantined) == (1, 1)
    assert "the two responses are the same: neither is better" in (folder / "out" / "quarantine.jsonl").read_text()


def test_a_schema_can_be_named_and_a_wrong_one_is_refused(folder: Path) -> None:
    source = write(folder, ROWS["pairwise"], "jsonl")
    assert len(import_preferences(source, folder / "out", schema="pairwise").preferences) == 2
    with pytest.raises(ValueError, match=r"schema rlaif_v needs chosen, rejected, .*: the nearest is pairwise"):
        import_preferences(source, folder / "out", schema="rlaif_v")
    with pytest.raises(ValueError, match="give auto or one of r1_reward"):
        import_preferences(source, folder / "out", schema="other")


def test_without_a_hub_its_data_sets_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="owner/data: neither a file here nor a data set that the Hub gives"):
        import_preferences("owner/data", folder / "out")


def table(folder: Path, count: int) -> Path:
    """Rows with embedded images of a few colours; some are refused."""
    rows = [
        {"id": str(index), "prompt": f"Which {index}?", "chosen": f"good {index}",
         "rejected": "" if index == 7 else "bad",
         "image": {"bytes": png(("red", "blue", "green")[index % 3]), "path": None}}
        for index in range(count)
    ]  # fmt: skip
    return write(folder, rows, "parquet")


@pytest.mark.slow
def test_several_processes_write_what_one_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_parts, "BATCH_ROWS", 4)
    source, found = table(folder, 21), []
    for processes in (1, 2):
        out = folder / "out"
        result = import_preferences(source, out, processes=processes)
        assert (result.rows, result.quarantined) == (20, 1)
        assert sorted(path.name for path in out.iterdir()) == [
            "import.json", "media", "preferences.jsonl", "quarantine.jsonl"
        ]  # fmt: skip
        found.append([(out / name).read_bytes() for name in ("preferences.jsonl", "quarantine.jsonl", "import.json")])
    assert found[0] == found[1]


@pytest.mark.parametrize("killed_after", [0, 1, 3, 5])
def test_an_import_that_was_killed_reads_and_writes_nothing_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr(import_parts, "BATCH_ROWS", 4)
    source, read = table(folder, 20), []
    whole = import_preferences(source, folder / "out")
    expected = whole.path.read_bytes()
    whole.path.unlink()
    real = import_parts._read_part

    def one(payload: bytes, *rest: Any) -> None:
        if len(read) == killed_after:
            raise KeyboardInterrupt
        read.append(payload)
        real(payload, *rest)

    monkeypatch.setattr(import_parts, "_read_part", one)
    if killed_after < 5:
        with pytest.raises(KeyboardInterrupt):
            import_preferences(source, folder / "out")
    else:  # all parts are there, and the end of the import is not
        monkeypatch.setattr(importing, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_preferences(source, folder / "out")
        monkeypatch.undo()
        monkeypatch.setattr(import_parts, "BATCH_ROWS", 4)
    assert killed_after == 5 or not whole.path.exists(), "no half of a file"
    again: list[bytes] = []
    monkeypatch.setattr(
        import_parts, "_read_part", lambda payload, *rest: (again.append(payload), real(payload, *rest))
    )
    assert import_preferences(source, folder / "out").rows == 19
    refused = 1 if killed_after > 1 else 0  # the part with the refused row is read again: it may be mended now
    assert len(again) == 5 - killed_after + refused
    assert whole.path.read_bytes() == expected


def test_another_source_does_not_get_the_parts_of_a_killed_import(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(folder, [{"id": 1, "prompt": "q", "chosen": "a", "rejected": "b"}], "jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(importing, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_preferences(source, folder / "out", order="stored")
    source.write_text(source.read_text().replace('"b"', '"c"'))
    (row,) = import_preferences(source, folder / "out", order="stored").preferences
    assert row.responses == ("a", "c")


def test_repeats_are_counted_and_removed_with_what_a_benchmark_asks(folder: Path) -> None:
    (folder / "b.png").write_bytes(png("blue"))
    Image.open(folder / "a.png").save(folder / "again.jpg", quality=60)
    rows = [
        {"id": 1, "prompt": "Which digit?", "chosen": "7", "rejected": "3", "image": "a.png"},
        {"id": 2, "prompt": "which  digit?", "chosen": "3", "rejected": "7.", "image": "again.jpg"},  # a repeat
        {"id": 3, "prompt": "Which digit?", "chosen": "7", "rejected": "3", "image": "b.png"},  # other pixels
        {"id": 4, "prompt": "Why?", "chosen": "a", "rejected": "b"},
    ]
    source = write(folder, rows, "jsonl")
    benchmark = folder / "bench.json"
    benchmark.write_text(json.dumps([{"prompt": "WHY?", "chosen": "x", "rejected": "y"}]))
    result = import_preferences(source, folder / "counted")
    account = json.loads((folder / "counted" / "import.json").read_text())
    assert (result.rows, account["duplicates"], account["overlap"]) == (4, 1, {})
    command = ["data", "import", str(source), "--out", str(folder / "out"), "--remove-duplicates"]
    done = CliRunner().invoke(app, [*command, "--remove-overlap-with", str(benchmark)])
    assert done.exit_code == 0, done.output
    account = json.loads((folder / "out" / "import.json").read_text())
    assert (account["rows"], account["duplicates"], account["overlap"]) == (2, 1, {str(benchmark): 1})
    kept = [json.loads(line)["id"] for line in (folder / "out" / "preferences.jsonl").read_text().splitlines()]
    assert kept == ["1", "3"]
    refused = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in refused] == [2, 4]
    assert str(benchmark) in refused[1]["reason"]


def test_near_repeats_are_counted_and_removed(folder: Path) -> None:
    (folder / "b.png").write_bytes(png("blue"))
    long = "The red car on the left stands beside an old tree"
    rows = [
        {"id": 1, "prompt": "Which?", "chosen": long, "rejected": "no", "image": "a.png"},
        {"id": 2, "prompt": "Which?", "chosen": "No.", "rejected": long.replace("red", "blue"), "image": "a.png"},
        {"id": 3, "prompt": "Which?", "chosen": long.replace("red", "green"), "rejected": "no", "image": "b.png"},
        {"id": 4, "prompt": "Which?", "chosen": long.replace("tree", "old tree"), "rejected": "no", "image": "a.png"},
        {"id": 5, "prompt": "Which?", "chosen": long, "rejected": "NO", "image": "a.png"},  # a repeat
    ]
    source = write(folder, rows, "jsonl")
    result = import_preferences(source, folder / "counted")
    account = json.loads((folder / "counted" / "import.json").read_text())
    assert (result.rows, account["duplicates"], account["near_duplicates"]) == (5, 1, 2)
    command = ["data", "import", str(source), "--out", str(folder / "out"), "--remove-near-duplicates"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    kept = [json.loads(line)["id"] for line in (folder / "out" / "preferences.jsonl").read_text().splitlines()]
    assert kept == ["1", "3", "5"]
    refused = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in refused] == [
        (2, "it differs by one word from line 1, id '1'"), (4, "it differs by one word from line 1, id '1'")
    ]  # fmt: skip


def test_repeated_ids_get_names_that_nobody_else_has(folder: Path) -> None:
    rows = [
        {"id": name, "prompt": f"Which {number}?", "chosen": "a", "rejected": "b"}
        for number, name in enumerate(("x", "x#2", "x", "x", "y"))
    ]
    result = import_preferences(write(folder, [*rows, rows[2]], "jsonl"), folder / "out")
    assert [row.id for row in result.preferences] == ["x", "x#2", "x#3", "x#4", "y"]
    (refused,) = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert refused["reason"] == "the same as line 3, id 'x#3'"


def test_a_process_that_is_killed_is_named_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    future: Future[None] = Future()
    future.set_exception(BrokenProcessPool("a child process terminated abruptly"))
    monkeypatch.setattr(import_parts, "BATCH_ROWS", 4)
    monkeypatch.setattr(import_parts.ProcessPoolExecutor, "submit", lambda *_: future)
    with pytest.raises(ValueError, match="goes on where it stopped, with fewer --processes"):
        import_preferences(table(folder, 20), folder / "out", processes=2)


PAIRS = [
    {"question": "2 + 2?", "response_1": "4", "response_2": "5", "answer": answer, "id": f"row-{answer}"}
    for answer in (1, 2)
]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", gzip.compress(b"{}"), "compressed by gzip: unpack it with gunzip"),
        ("a.json", b"\x28\xb5\x2f\xfd...", "compressed by zstd"),
        ("a.parquet", b"PK\x03\x04...", "an archive: unpack it"),
        ("a.jsonl", json.dumps(PAIRS[0]).encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.jsonl", b"", "no readable row: it is empty"),
        ("a.jsonl", b"\n{\n", "no readable row: line 2: malformed JSON"),
        ("a.json", json.dumps(PAIRS).encode()[:-5], "malformed JSON after row 1 (parse error: premature EOF)"),
        ("a.json", b"", "malformed JSON after row 0 (parse error: premature EOF)"),
        ("folder/a.jsonl", b"{}", "a saved datasets folder; give one of its .jsonl files"),
    ],
)
def test_what_cannot_be_read_is_named_in_a_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path if path.parent == tmp_path else path.parent
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        import_preferences(source, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_row_and_a_first_row_without_answer_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_bytes(codecs.BOM_UTF8 + json.dumps(PAIRS).encode())
    assert import_preferences(tmp_path / "marked.json", tmp_path / "marked").rows == 2
    rows = [{**PAIRS[0], "id": "first", "answer": None}, *PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = import_preferences(tmp_path / "rows.jsonl", tmp_path / "read")
    assert (read.rows, read.quarantined) == (2, 1)
