"""Sources of rows: several files, splits, JSON arrays, and what is not data at all."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_r1reward.data.rows import iterate_rows

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def shard(path: Path, *values: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"value": pa.array(values, pa.int64())}), path)


def values_of(path: Path) -> list[int]:
    return [row.fields["value"] for row in iterate_rows(path) if row.fields is not None]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/validation-0.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("my_train.parquet", "my.dev.parquet"),
    ],
)
def test_splits_in_one_folder_are_not_one_set(tmp_path: Path, train: str, test: str) -> None:
    shard(tmp_path / train, 1, 2)
    shard(tmp_path / test, 3)
    with pytest.raises(ValueError, match="files of several splits") as refused:
        values_of(tmp_path)
    pattern = Path(str(refused.value).split("'")[1])  # what the message proposes works
    if pattern.parent == (tmp_path / train).parent:
        assert values_of(pattern) in ([1, 2], [3])
    assert values_of(tmp_path / train) == [1, 2]


def test_shards_of_one_split_are(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00003.parquet", 1)
    shard(tmp_path / "train-00001-of-00003.parquet")
    shard(tmp_path / "train-00002-of-00003.parquet", 2)
    assert values_of(tmp_path) == values_of(tmp_path / "train-*.parquet") == [1, 2]
    shard(tmp_path / "contest-0.parquet", 3)  # no split's name, though it ends like one
    assert values_of(tmp_path) == [3, 1, 2]


def test_json_arrays_are_streamed_and_bad_elements_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"value": 1}, 5, {"value": 2}]))
    rows = list(iterate_rows(path))
    assert [row.fields for row in rows] == [{"value": 1}, None, {"value": 2}]
    assert (rows[1].origin.line, rows[1].error) == (2, "not a JSON object but int")
    path.write_text('{\n"value": 1}')
    with pytest.raises(ValueError, match="not a JSON array"):
        list(iterate_rows(path))
    path.write_text('{"value": 1}')  # a file of JSON lines under another name
    assert [row.fields for row in iterate_rows(path)] == [{"value": 1}]
    path.write_text('[{"value": 1}, {"val')
    with pytest.raises(ValueError, match="malformed JSON after row 1"):
        list(iterate_rows(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        list(iterate_rows(tmp_path / name))


def test_a_pattern_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        list(iterate_rows(tmp_path / "train-*.parquet"))
