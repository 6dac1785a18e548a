"""What `data import` counts of a set, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from megatron_r1reward.cli import app
from megatron_r1reward.data.set_figures import LENGTH_EDGES, RATIO_EDGES, SetFigures
from megatron_r1reward.report.balance_chart import balance_svg
from megatron_r1reward.types import Preference


def row(first: str, second: str, label: int, **metadata: str) -> Preference:
    return Preference(id="x", question="q", responses=(first, second), label=label, image_paths=(), metadata=metadata)  # type: ignore[arg-type]


def test_what_is_counted() -> None:
    figures = SetFigures()
    figures.add(row("a" * 64, "a" * 16, 1, category="count"))  # four times as long: bin 0 is in the middle
    figures.add(row("a" * 16, "a" * 16, 2, category="read"), exchanged=True)  # stood first in the source
    figures.add(row("a", "a" * 10**7, 1))  # beyond all bins
    found = figures.to_json()
    assert found["labels"] == {"1": 2, "2": 1}
    assert (found["better_first_in_source"], found["longer_is_better"]) == (3, 1)
    ratios = dict(zip(RATIO_EDGES[:-1] + 0.25, found["log2_length_ratio"]["counts"], strict=True))
    assert {center: count for center, count in ratios.items() if count} == {-4.0: 1, 0.0: 1, 2.0: 1}
    better = dict(zip(LENGTH_EDGES[:-1], found["log2_characters_of_better"]["counts"], strict=True))
    assert {edge: count for edge, count in better.items() if count} == {0.0: 1, 4.0: 1, 6.0: 1}
    assert (found["images"], found["categories"], found["sources"]) == ({"0": 3}, {"count": 1, "read": 1}, {})


@pytest.mark.parametrize("metadata", [{}, {"category": "a & b <c>"}, {"source": "web"}])
def test_the_picture_is_an_svg_of_any_set(metadata: dict[str, str]) -> None:
    figures = SetFigures()
    figures.add(row("a", "b", 2, **metadata))
    picture = ElementTree.fromstring(balance_svg(figures.to_json()))
    assert picture.tag.endswith("svg")
    assert len(list(picture.iter())) > 100
    assert balance_svg(figures.to_json()) == balance_svg(figures.to_json()), "the same set, the same bytes"


def test_data_import_draws_it(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Which {i}?", "chosen": "good answer", "rejected": "no"} for i in range(6)]
    source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    done = CliRunner().invoke(app, ["data", "import", str(source), "--out", str(tmp_path / "out"), "--processes", "1"])
    assert done.exit_code == 0, done.output
    balance = json.loads((tmp_path / "out" / "import.json").read_text())["balance"]
    assert (balance["labels"], balance["better_first_in_source"], balance["longer_is_better"]) == (
        {"1": 3, "2": 3}, 6, 6
    )  # fmt: skip
    assert (tmp_path / "out" / "balance.svg").read_bytes() == balance_svg(balance)
