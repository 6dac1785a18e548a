"""Attempt records: difficulty, the hard set, and a file that survives a crash in the middle of a row."""

import pytest

from megatron_r1reward.data.difficulty import AttemptRecord, append_record, read_records, select_hard, summary


def record(identifier, *attempts):
    return AttemptRecord(preference_id=identifier, attempts=attempts)


RECORDS = [
    record("easy", True),
    record("second", False, True),
    record("third", False, False, True),
    record("never", False, False, False),
]


def test_difficulty_is_the_number_of_attempts_needed():
    assert [entry.difficulty for entry in RECORDS] == [1, 2, 3, 4]


def test_hard_needed_a_second_attempt_or_was_never_solved():
    assert select_hard(RECORDS) == ["second", "third", "never"]
    assert select_hard([]) == []


def test_summary_counts_each_preference_once_by_its_last_record():
    assert summary(RECORDS) == {"1": 1, "2": 1, "3": 1, "never": 1}
    again = [*RECORDS, record("never", True)]
    assert summary(again) == {"1": 2, "2": 1, "3": 1, "never": 0}
    assert select_hard(again) == ["second", "third"]


def test_a_record_needs_attempts():
    with pytest.raises(ValueError, match="'x' has no attempts"):
        record("x")


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "new" / "attempts.jsonl"
    for entry in RECORDS:
        append_record(path, entry)
    assert read_records(path) == RECORDS


@pytest.mark.parametrize("lost", [1, 2, 10, 40])
def test_torn_last_row_is_ignored_and_healed(tmp_path, caplog, lost):
    path = tmp_path / "attempts.jsonl"
    for entry in RECORDS:
        append_record(path, entry)
    path.write_bytes(path.read_bytes()[:-lost])
    kept = RECORDS if lost == 1 else RECORDS[:-1]  # only the line break is lost: the row is whole
    assert read_records(path) == kept
    assert ("torn" in caplog.text) == (lost > 1)
    append_record(path, record("after", True))
    assert read_records(path) == [*kept, record("after", True)]


def test_file_that_holds_only_a_torn_row(tmp_path):
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(b'{"preference_id": "a", "att')
    assert read_records(path) == []
    append_record(path, RECORDS[0])
    assert read_records(path) == RECORDS[:1]


@pytest.mark.parametrize(
    "row", ["{", "[]", '{"preference_id": 3, "attempts": [true]}', '{"preference_id": "a", "attempts": [1]}',
            '{"preference_id": "a", "attempts": []}', '{"preference_id": "a"}']
)  # fmt: skip
def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path, row):
    path = tmp_path / "attempts.jsonl"
    append_record(path, RECORDS[0])
    with path.open("a") as file:
        file.write(row + "\n")
    append_record(path, RECORDS[1])
    with pytest.raises(ValueError, match=r"attempts\.jsonl, line 2"):
        read_records(path)
