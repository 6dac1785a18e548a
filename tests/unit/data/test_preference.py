"""The reader: every published shape of a row is understood, and no bad row is fatal or lost."""

import base64
import hashlib
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_r1reward.data import image_files
from megatron_r1reward.data.image_files import folders_behind_links
from megatron_r1reward.data.preference import read_preferences, read_sft_examples
from megatron_r1reward.data.prompt import preference_messages


def image_bytes(color="red", kind="png", size=(32, 24)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(image_bytes())
    (folder / "b.jpg").write_bytes(image_bytes("blue", "jpeg"))
    return folder


def chat(question="Q?", responses=("one", "two"), images=("a.png",)):
    """A message as R1-Reward-RL has it: the text first, the images last."""
    (turn,) = preference_messages(question, responses, 0)
    entries = [{"type": "image", "image": image} for image in images]
    return json.dumps([{"role": "user", "content": turn["content"] + entries}])


def row(**changes):
    fields = {"message": chat(), "question": "Q?", "answer": ["<answer>2</answer>"], "image": "a.png", **changes}
    return {key: value for key, value in fields.items() if value is not ...}  # ... removes a column


def write(root, *rows, name="rows.jsonl"):
    path = root / name
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_one(root, tmp_path, entry):
    result = read_preferences(write(root, entry), media_dir=tmp_path / "media")
    assert (result.quarantined, result.quarantine_path) == (0, None)
    (preference,) = result.preferences
    return preference


def quarantine_of(result):
    return [json.loads(line) for line in result.quarantine_path.read_text().splitlines()]


def test_published_row(root, tmp_path):
    preference = read_one(root, tmp_path, row(image=..., question="The question"))
    assert preference.question == "The question"
    assert preference.responses == ("one", "two")
    assert preference.label == 2
    assert preference.image_paths == (str(root / "a.png"),)
    assert preference.id == "rows-1"
    assert not (root / "rows.jsonl.quarantine.jsonl").exists()


def test_question_comes_from_the_message_when_there_is_no_column(root, tmp_path):
    assert read_one(root, tmp_path, row(question=..., message=chat(question="From text"))).question == "From text"


def test_explicit_columns_win_and_make_the_message_unnecessary(root, tmp_path):
    explicit = {
        "response_1": "first",
        "response_2": "second",
        "images": ["b.jpg"],
        "id": 17,
        "category": "c",
        "source": "s",
    }
    for message in (chat(), ...):
        preference = read_one(root, tmp_path, row(message=message, **explicit))
        assert preference.responses == ("first", "second")
        assert preference.image_paths == (str(root / "b.jpg"),)
        assert preference.id == "17"
        assert preference.metadata == {"category": "c", "source": "s"}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (["<answer>1</answer>"], 1),
        ("<answer> 2 </answer>", 2),
        ("1", 1),
        (" 2\n", 2),
        (2, 2),
        (["2"], 2),
        ([1], 1),
        (2.0, 2),
    ],
)
def test_forms_of_a_label(root, tmp_path, answer, label):
    assert read_one(root, tmp_path, row(answer=answer)).label == label


def test_message_may_be_stored_as_lists(root, tmp_path):
    assert read_one(root, tmp_path, row(message=json.loads(chat()))).responses == ("one", "two")


@pytest.mark.parametrize("form", ["name", "list", "mapping", "file url", "absolute"])
def test_forms_of_an_image_path(root, tmp_path, form):
    absolute = str(root / "a.png")
    value = {
        "name": "a.png",
        "list": ["a.png"],
        "mapping": {"bytes": None, "path": "a.png"},
        "file url": f"file://{absolute}",
        "absolute": absolute,
    }[form]
    assert read_one(root, tmp_path, row(image=value)).image_paths == (absolute,)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp"])
@pytest.mark.parametrize("form", ["base64", "wrapped base64", "data url", "mapping"])
def test_embedded_images_are_written_once_by_content(root, tmp_path, kind, form):
    content = image_bytes("green", kind)
    text = base64.b64encode(content).decode()
    value = {
        "base64": text,
        "wrapped base64": base64.encodebytes(content).decode(),
        "data url": f"data:image/{kind};base64,{text}",
        "mapping": {"bytes": text, "path": "elsewhere/x.png"},
    }[form]
    path = write(root, row(image=value), row(image=value))
    first, second = read_preferences(path, media_dir=tmp_path / "media").preferences
    expected = tmp_path / "media" / f"{hashlib.sha256(content).hexdigest()[:32]}.{kind}"
    assert first.image_paths == second.image_paths == (str(expected),)
    assert list((tmp_path / "media").iterdir()) == [expected]
    assert expected.read_bytes() == content


def test_several_images_keep_their_order(root, tmp_path):
    several = row(message=chat(images=("b.jpg", "a.png")), image=["b.jpg", "a.png"])
    assert read_one(root, tmp_path, several).image_paths == (str(root / "b.jpg"), str(root / "a.png"))


def test_embedded_images_need_a_folder(root):
    path = write(root, row(image=base64.b64encode(image_bytes()).decode()))
    with pytest.raises(ValueError, match="give media_dir"):
        read_preferences(path)


BAD_ROWS = {
    "malformed JSON": (b'{"message": ', "malformed JSON"),
    "not UTF-8": (b'{"message": "\xff\xfe"}', "malformed JSON"),
    "deep nesting": (b"[" * 100_000, "malformed JSON"),
    "not an object": (b"[1, 2]", "not a JSON object but list"),
    "malformed message": (row(message="[{"), "message is malformed JSON"),
    "message without turns": (row(message="[]"), "not a list of chat turns"),
    "unknown role": (row(message=json.dumps([{"role": "judge", "content": "x"}])), "role 'judge'"),
    "video": (row(message=json.dumps([{"role": "user", "content": [{"type": "video"}]}])), "type 'video'"),
    "no user turn": (row(message=json.dumps([{"role": "system", "content": "x"}])), "no user turn"),
    "no responses anywhere": (row(message=...), "neither message nor response_1"),
    "message of another form": (row(message=json.dumps([{"role": "user", "content": "Which?"}])), "no heading"),
    "missing answer": (row(answer=...), "answer is missing"),
    "null answer": (row(answer=None), "answer is missing"),
    "two answers": (row(answer=["1", "2"]), "neither 1 nor 2"),
    "answer 3": (row(answer="3"), "answer '3' is neither 1 nor 2"),
    "answer 12": (row(answer="12"), "neither 1 nor 2"),
    "true as answer": (row(answer=True), "neither 1 nor 2"),
    "fraction as answer": (row(answer=1.5), "neither 1 nor 2"),
    "unclosed answer": (row(answer="<answer>1"), "neither 1 nor 2"),
    "empty response": (row(response_1="", response_2="x"), "response 1 is empty"),
    "blank response in the message": (row(message=chat(responses=("x", " \n"))), "response 2 is empty"),
    "response of another type": (row(response_1="x", response_2=["y"]), "response 2 is list, not text"),
    "empty question": (row(question=" "), "question is empty"),
    "control token": (row(response_1="x<|im_end|>\n<|im_start|>system", response_2="y"), "control token <|im_end|>"),
    "unpaired surrogate": (row(response_1="x \ud800", response_2="y"), "unpaired surrogate at character 2"),
    "unpaired surrogate in the category": (row(category="x\ud800"), "category holds an unpaired surrogate"),
    "unpaired surrogate in the id": (row(id="\ud800"), "id holds an unpaired surrogate"),
    "file name of other bytes": (row(image="caf\udce9.png"), "image path holds an unpaired surrogate"),
    "missing image": (row(image="nowhere.png"), "'nowhere.png' is missing"),
    "image in another case": (row(image="A.png"), "is missing"),
    "folder as image": (row(image="."), "is missing"),
    "empty image path": (row(image=""), "image path is empty"),
    "null in a list": (row(image=[None]), "image is empty"),
    "empty mapping": (row(image={"bytes": None, "path": None}), "image is empty"),
    "number as image": (row(image=3), "image is int"),
    "remote image": (row(image="https://example.org/a.png"), "remote"),
    "very long path": (row(image="x" * 9000), "not usable as a path"),
    "null character in path": (row(image="a\0.png"), "not usable as a path"),
    "path upwards": (row(image="../outside.png"), "leaves the image root"),
    "path elsewhere": (row(image="/etc/hostname"), "leaves the image root"),
    "up and away": (row(image="inside/../../outside.png"), "leaves the image root"),
    "dangling link": (row(image="dangling.png"), "gone.png"),
    "git-lfs pointer": (row(image="pointer.png"), "git lfs pull"),
    "placeholders without images": (row(question="<image> or <image>?"), "shows 2 <image> placeholders"),
    "empty file": (row(image="empty.png"), "corrupt"),
    "text as image": (row(image="text.png"), "corrupt"),
    "cut off image": (row(image="cut.jpg"), "corrupt"),
    "one-pixel strip": (row(image="strip.png"), "aspect ratio"),
    "damaged base64": (row(image="iVBORw0KGgo" + "A" * 30), "not valid base64"),
    "base64 of no image": (row(image="data:image/png;base64,aGVsbG8="), "no known format"),
    "empty data URL": (row(image="data:image/png;base64,"), "embedded image is empty"),
    "fewer images than shown": (row(message=chat(images=("a.png", "b.jpg"))), "shows 2 images, the row has 1"),
    "list as id": (row(id=["x"]), "neither text nor number"),
    "duplicate id": (row(id="good"), "duplicate id 'good', first used in line 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_quarantined_and_the_others_are_read(root, tmp_path, caplog, name):
    bad, reason = BAD_ROWS[name]
    (tmp_path / "outside.png").write_bytes(image_bytes())
    (root / "inside").symlink_to(root)
    (root / "dangling.png").symlink_to(tmp_path / "gone.png")
    (root / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (root / "empty.png").touch()
    (root / "text.png").write_text("not an image")
    (root / "cut.jpg").write_bytes(image_bytes(kind="jpeg", size=(200, 200))[:-300])
    (root / "strip.png").write_bytes(image_bytes(size=(1000, 1)))
    (root / "caf\udce9.png").write_bytes(image_bytes())
    path = write(root, row(id="good"), bad, row())
    result = read_preferences(path, media_dir=tmp_path / "media")
    assert [preference.id for preference in result.preferences] == ["good", "rows-3"]
    assert result.quarantined == 1
    assert result.quarantine_path == root / "rows.jsonl.quarantine.jsonl"
    (entry,) = quarantine_of(result)
    assert (entry["source"], entry["line"]) == ("rows.jsonl", 2)
    assert reason in entry["reason"]
    assert 0 < len(entry["row"]) <= 500
    assert f"{path}: 1 rows are unusable" in caplog.text


def test_unverified_reading_still_needs_the_files_to_exist(root):
    (root / "text.png").write_text("not an image")
    result = read_preferences(write(root, row(image="text.png"), row(image="nowhere.png")), verify_images=False)
    assert (len(result.preferences), result.quarantined) == (1, 1)


def test_quarantine_file_describes_the_last_read_in_file_order(root, tmp_path):
    (root / "text.png").write_text("not an image")
    target = tmp_path / "bad" / "rows.jsonl"
    path = write(root, row(image="text.png"), b"{", row())
    result = read_preferences(path, quarantine=target)
    assert [entry["line"] for entry in quarantine_of(result)] == [1, 2]
    assert read_preferences(write(root, row()), quarantine=target).quarantine_path is None
    assert target.read_text() == ""


def test_every_image_is_decoded_once(root, monkeypatch):
    decoded = []
    original = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda path: decoded.append(path) or original(path))
    read_preferences(write(root, row(), row(), row(image="./a.png"), row(image="b.jpg")))
    assert sorted(decoded) == [str(root / "a.png"), str(root / "b.jpg")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(root):
    path = write(root, b"\xef\xbb\xbf" + json.dumps(row()).encode(), b"", b"   ", row())
    result = read_preferences(path)
    assert [preference.id for preference in result.preferences] == ["rows-1", "rows-4"]
    assert result.quarantined == 0


def test_image_root_can_be_elsewhere(root, tmp_path):
    path = write(tmp_path, row())
    assert read_preferences(path, image_root=root).preferences[0].image_paths == (str(root / "a.png"),)


def test_nothing_usable_is_an_error_that_gives_a_reason(root):
    with pytest.raises(ValueError, match=r"no usable row \(it is empty\)"):
        read_preferences(write(root, b""))
    with pytest.raises(ValueError, match="first of 2 reasons: answer is missing"):
        read_preferences(write(root, row(answer=...), row(answer="3")))
    assert len((root / "rows.jsonl.quarantine.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["nowhere.jsonl", "rows.csv", "folder", "damaged.parquet"])
def test_unknown_data_is_refused_by_name(root, name):
    (root / "rows.csv").write_text("a,b")
    (root / "folder").mkdir()
    (root / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=name):
        read_preferences(root / name)


def embedded_rows():
    """As the published Parquet files have them: columns of text and one of embedded images."""
    return [row(image={"bytes": image_bytes(color), "path": None}, id=color) for color in ("red", "green", "blue")]


def check_embedded(result, media):
    assert [preference.id for preference in result.preferences] == ["red", "green", "blue"]
    for preference in result.preferences:
        (path,) = preference.image_paths
        assert path.startswith(str(media))
        with Image.open(path) as image, Image.new("RGB", (1, 1), preference.id) as expected:
            assert image.getpixel((0, 0)) == expected.getpixel((0, 0))


def test_parquet_file_and_folder_of_files(root, tmp_path):
    first, *others = embedded_rows()
    (root / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist([first]), root / "shards" / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist(others), root / "shards" / "train-1.parquet")
    check_embedded(read_preferences(root / "shards", media_dir=tmp_path / "media"), tmp_path / "media")
    single = read_preferences(root / "shards" / "train-1.parquet", media_dir=tmp_path / "media")
    assert [preference.id for preference in single.preferences] == ["green", "blue"]


def test_parquet_rows_without_ids_are_numbered_by_file(root):
    (root / "shards").mkdir()
    for shard in ("x", "y"):
        pq.write_table(pa.Table.from_pylist([row(image=...)] * 2), root / "shards" / f"{shard}.parquet")
    result = read_preferences(root / "shards", image_root=root)
    assert [preference.id for preference in result.preferences] == ["x-1", "x-2", "y-1", "y-2"]


def test_bad_parquet_row_is_quarantined_without_its_image(root, tmp_path):
    rows = [*embedded_rows(), row(image={"bytes": image_bytes()[:60], "path": None}, id="cut")]
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    result = read_preferences(root / "rows.parquet", media_dir=tmp_path / "media")
    check_embedded(result, tmp_path / "media")
    (entry,) = quarantine_of(result)
    assert entry["line"] == 4
    assert "<60 bytes>" in entry["row"]


def test_saved_datasets_folder_with_an_image_column(root, tmp_path):
    dataset = datasets.Dataset.from_list(embedded_rows()).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(root / "saved"))
    check_embedded(read_preferences(root / "saved", media_dir=tmp_path / "media"), tmp_path / "media")
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(root / "splits"))
    with pytest.raises(ValueError, match=r"splits \['train'\]: give the folder of one split"):
        read_preferences(root / "splits")
    check_embedded(read_preferences(root / "splits" / "train", media_dir=tmp_path / "media"), tmp_path / "media")


def sft_row(**changes):
    return row(**{"answer": ..., "question": ..., "response": "<think>x</think><answer>2</answer>", **changes})


def test_supervised_rows_with_images_and_with_text_only(root):
    dialogue = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "and 1?"}]},
    ]
    path = write(root, sft_row(image=..., id="seen"), sft_row(message=json.dumps(dialogue), image=..., response="3"))
    seen, text_only = read_sft_examples(path).examples
    assert seen.id == "seen"
    assert seen.messages[0]["content"][-1] == {"type": "image"}
    assert seen.image_paths == (str(root / "a.png"),)
    assert seen.response == "<think>x</think><answer>2</answer>"
    assert [turn["role"] for turn in text_only.messages] == ["system", "user", "assistant", "user"]
    assert text_only.messages[1]["content"] == [{"type": "text", "text": "1 + 1?"}]
    assert text_only.image_paths == ()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (sft_row(response=...), "response is missing"),
        (sft_row(response=" "), "response is empty"),
        (sft_row(response="<|im_end|>"), "response holds the control token"),
        (sft_row(message=...), "not a list of chat turns"),
        (sft_row(message=chat(question="<|image_pad|>")), "message holds the control token <|image_pad|>"),
        (sft_row(message=chat(images=())), "message shows 0 images, the row has 1"),
        (sft_row(message=json.dumps([{"role": "assistant", "content": "x"}])), "ends with a turn of the assistant"),
        (sft_row(image="nowhere.png"), "missing"),
        (b"}", "malformed JSON"),
    ],
)
def test_bad_supervised_row_is_quarantined(root, bad, reason):
    result = read_sft_examples(write(root, sft_row(), bad))
    assert (len(result.examples), result.quarantined) == (1, 1)
    assert reason in quarantine_of(result)[0]["reason"]


def test_files_with_answers_0_and_1_are_refused_and_one_sided_ones_are_named(root, caplog):
    path = write(root, *[row(answer=index % 2) for index in range(8)])
    with pytest.raises(ValueError, match="answers are 0 and 1"):  # half of them, all labelled 1, would be a trap
        read_preferences(path)
    result = read_preferences(write(root, row(answer=0), row(answer=1), row(answer=2)))  # 0 may be a tie
    assert (len(result.preferences), result.quarantined) == (2, 1)
    caplog.clear()
    read_preferences(write(root, *[row(answer=1) for _ in range(20)]))
    assert "all 20 labels are 1" in caplog.text


def test_columns_that_other_writers_make_of_ours(root, tmp_path):
    (root / "shards").mkdir()
    table = pa.table({"id": [7.0, 8.0], "answer": [1.0, 2.0], "image": [image_bytes()] * 2, "message": [chat()] * 2})
    pq.write_table(table, root / "shards" / "a.parquet")
    pq.write_table(table.slice(0, 0), root / "shards" / "empty.parquet")
    result = read_preferences(root / "shards", media_dir=tmp_path / "media")
    assert [(row.id, row.label) for row in result.preferences] == [("7", 1), ("8", 2)]
    assert read_one(root, tmp_path, row(images=[])).image_paths == (str(root / "a.png"),)


@pytest.mark.parametrize("kind", ["tiff", "ppm", "jpeg2000", "tga"])
def test_base64_of_any_picture(root, tmp_path, kind):
    encoded = base64.b64encode(image_bytes(kind=kind, size=(64, 48))).decode()
    (path,) = read_one(root, tmp_path, row(image=encoded)).image_paths
    with Image.open(path) as image:
        assert image.size == (64, 48)
    (entry,) = quarantine_of(read_preferences(write(root, row(), row(image=encoded[:-400])), media_dir=tmp_path / "m"))
    assert len(entry["reason"]) < 400  # not the picture's text


def test_rows_about_text_alone_are_preferences_too(root, tmp_path):
    assert read_one(root, tmp_path, row(message=chat(images=()), image=...)).image_paths == ()


def test_placeholders_of_other_programs_show_where_images_are(root, tmp_path):
    assert read_one(root, tmp_path, row(question="<image>\nWhat is it?")).question == "What is it?"
    assert read_one(root, tmp_path, row(question="Is this <image> red?")).question == "Is this red?"
    turns = [{"role": "user", "content": "First <image>\nthen <image>: which?"}]
    sft = read_sft_examples(write(root, {"message": turns, "images": ["a.png", "b.jpg"], "response": "r"})).examples[0]
    assert [part.get("text", part["type"]) for part in sft.messages[0]["content"]] == [
        "First ", "image", "then ", "image", ": which?",
    ]  # fmt: skip


def test_links_inside_the_root_are_followed_and_further_roots_are_named(root, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "blob").write_bytes(image_bytes())
    (root / "cached.png").symlink_to(scratch / "blob")  # a download cache
    (root / "images").symlink_to(scratch)  # data on another disk
    paths = [read_one(root, tmp_path, row(image=name)).image_paths[0] for name in ("cached.png", "images/blob")]
    assert paths == [str(root / "cached.png"), str(root / "images" / "blob")]
    elsewhere = write(root, row(image=str(scratch / "blob")))
    with pytest.raises(ValueError, match=r"data\.image_roots takes further folders"):
        read_preferences(elsewhere)
    assert read_preferences(elsewhere, image_roots=[scratch]).preferences[0].image_paths == (str(scratch / "blob"),)
    (root / "loop.png").symlink_to("loop.png")
    assert folders_behind_links(root) == [scratch]


@pytest.mark.parametrize("answer", [..., None, "", "tie", ["<answer>tie</answer>"], ["tie"]])
def test_rows_without_a_label_are_read_where_they_can_be_used(root, answer):
    path = write(root, row(answer=answer, id="open"), row(answer="2", id="labelled"))
    result = read_preferences(path, unlabelled=True)
    assert [(one.id, one.label) for one in result.preferences] == [("open", None), ("labelled", 2)]
    (kept,) = read_preferences(path).preferences
    assert kept.id == "labelled"
    reason = json.loads(path.with_name(f"{path.name}.quarantine.jsonl").read_text())["reason"]
    assert reason.startswith("answer")
    with pytest.raises(ValueError, match="neither 1 nor 2"):
        read_preferences(write(root, row(answer="3")), unlabelled=True)


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_key_that_stands_twice_is_no_answer(root, tmp_path, kind):
    """The last one won, without a word."""
    good = row()
    twice = json.dumps(good)[:-1] + ', "answer": ["<answer>1</answer>"]}'
    inner = json.dumps(good | {"extra": 1})[:-1] + ', "more": {"a": 1, "a": 2}}'
    path = write(root, good, twice.encode(), inner.encode())
    if kind == "array":
        path = path.with_suffix(".json")
        path.write_text(f"[{json.dumps(good)}, {twice}, {inner}]")
    result = read_preferences(path, quarantine=tmp_path / "q.jsonl")
    assert len(result.preferences) == 1
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert reasons == ["'answer' stands twice in it", "'a' stands twice in it"]
