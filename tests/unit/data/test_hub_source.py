"""A data set of the Hub is imported through `datasets`, from a real HTTP server that speaks its routes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from PIL import Image

# Where the Hub is, `datasets` reads from the environment when it is imported.
PROGRAM = """
import json, sys
from pathlib import Path
import datasets
from megatron_r1reward.data.importing import import_preferences

out = Path(sys.argv[1])
for name in ("org/pairs", "org/lines"):
    import_preferences(name, out / name, order="stored")
import_preferences("org/pairs", out / "test", order="stored", split="test")
for name, split, folder in (
    ("org/gone", "train", out / "none"),
    ("org/pairs", "validation", out / "none"),
    ("org/pairs", "train", Path("org/pairs")),
):
    try:
        import_preferences(name, folder, split=split)
    except ValueError as error:
        print(json.dumps(str(error)))
    else:
        sys.exit(f"{name} was found")
datasets.load_dataset("org/pairs", split="train").save_to_disk(str(out / "saved"))
import_preferences(out / "saved", out / "from-disk", order="stored")
"""


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), color).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(numbers: range) -> bytes:
    rows = [
        {"idx": number, "question": f"Which {number}?", "chosen": "yes", "rejected": f"no {number}",
         "image": {"bytes": png(("red", "blue")[number % 2]), "path": None}, "origin_dataset": "x"}
        for number in numbers
    ]  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    server.hold_dataset(
        "org/pairs",
        {
            "README.md": b"---\nlicense: mit\n---\n# Pairs\n",
            "data/train-00000-of-00002.parquet": parquet(range(100)),
            "data/train-00001-of-00002.parquet": parquet(range(100, 130)),
            "data/test-00000-of-00001.parquet": parquet(range(3)),
        },
    )
    lines = [{"prompt": f"Why {number}?", "chosen": "a", "rejected": "b"} for number in range(3)]
    server.hold_dataset("org/lines", {"train.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()})
    yield server
    server.stop()


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_and_says_what_its_copy_on_the_disk_says(
    hub: HubServer, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_DATASETS_OFFLINE", None)
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        cwd=tmp_path / "home",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert [text.partition(":")[0] for text in refused[:2]] == ["org/gone", "org/pairs"]
    assert all("neither a file here nor a data set that the Hub gives" in text for text in refused[:2])
    assert "validation" in refused[1]
    assert "--out org/pairs would be a folder of the data set's name" in refused[2]
    account = {name: json.loads((tmp_path / name / "import.json").read_text()) for name in ("org/pairs", "org/lines")}
    assert (account["org/pairs"]["schema"], account["org/pairs"]["rows"]) == ("rlaif_v", 130)
    assert (account["org/lines"]["schema"], account["org/lines"]["rows"]) == ("chosen_rejected", 3)
    assert json.loads((tmp_path / "test" / "import.json").read_text())["rows"] == 3
    streamed, copied = (
        [json.loads(line) for line in (tmp_path / name / "preferences.jsonl").read_text().splitlines()]
        for name in ("org/pairs", "from-disk")
    )
    assert len(list((tmp_path / "org/pairs" / "media").iterdir())) == 2
    for one, other in zip(streamed, copied, strict=True):
        assert Path(one["images"][0]).read_bytes() == Path(other["images"][0]).read_bytes()
        assert {name: one[name] for name in ("id", "question", "response_1", "response_2", "answer")} == {
            name: other[name] for name in ("id", "question", "response_1", "response_2", "answer")
        }
