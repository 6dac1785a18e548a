"""Videos become frames, evenly spaced, whatever names them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_r1reward.data.image_files import MediaResolver
from megatron_r1reward.data.importing import import_preferences
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.data.rows import RowError
from megatron_r1reward.data.video_frames import evenly_spaced


def level(number: int) -> int:
    return 20 + 20 * number


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten frames that get brighter: a folder of them, and a video file."""
    (tmp_path / "frames").mkdir()
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 56))
    for number in range(10):
        frame = np.full((56, 64, 3), level(number), dtype=np.uint8)
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number:03}.png")
        writer.write(frame)
    writer.release()
    return tmp_path


def seen(paths: tuple[str, ...]) -> list[int]:
    """Which of the frames they are."""
    return [round((np.asarray(Image.open(path)).mean() - 20) / 20) for path in paths]


@pytest.mark.parametrize("most", [2, 4, 10, 32])
def test_a_folder_a_list_and_a_file_give_the_same_frames(folder: Path, most: int) -> None:
    media = MediaResolver([folder], folder / "media", max_frames=most)
    names = [f"frames/{number:03}.png" for number in range(10)]
    expected = [round(place) for place in np.linspace(0, 9, min(most, 10))]
    assert evenly_spaced(10, most) == expected
    for value in ({"frames": "frames"}, {"frames": names}, {"frames": "clip.avi"}):
        assert seen(media.resolve([value])) == expected, value
    assert media.resolve([{"frames": "clip.avi"}]) == media.resolve([{"frames": "clip.avi"}]), "written once"


def test_rows_with_videos_are_imported_and_read(folder: Path) -> None:
    def row(**video: Any) -> dict[str, Any]:
        return {"prompt": "<video>\nWhat gets brighter?", "chosen": f"a {video}", "rejected": "b", **video}

    rows = [row(video="frames"), row(video="clip.avi"), row(videos=["frames", "clip.avi"]),
            row(video=[f"frames/{number:03}.png" for number in (3, 5, 7)])]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = import_preferences(folder / "rows.jsonl", folder / "out", max_frames=4, order="stored").preferences
    assert [seen(one.image_paths) for one in found] == [[0, 3, 6, 9], [0, 3, 6, 9], [0, 3, 6, 9] * 2, [3, 5, 7]]
    assert {one.question for one in found} == {"What gets brighter?"}
    ours = {"question": "q", "response_1": "a", "response_2": "b", "answer": 1, "video": "clip.avi"}
    (folder / "ours.jsonl").write_text(json.dumps(ours) + "\n")
    (one,) = read_preferences(folder / "ours.jsonl", media_dir=folder / "media", max_frames=3).preferences
    assert seen(one.image_paths) == [0, 4, 9]


def test_what_cannot_be_decoded_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = MediaResolver([folder], folder / "media")
    (folder / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(RowError, match=r"broken.mp4' has 0 frames that can be decoded: it is damaged"):
        media.resolve([{"frames": "broken.mp4"}])
    with pytest.raises(RowError, match=r"gone.mp4' is missing"):
        media.resolve([{"frames": "gone.mp4"}])
    with pytest.raises(RowError, match="is a video: name it in the column video, or a folder with its frames"):
        media.resolve("clip.avi")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cv2":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RowError, match="install opencv-python-headless, or extract its frames into a folder"):
        media.resolve([{"frames": "clip.avi"}])
