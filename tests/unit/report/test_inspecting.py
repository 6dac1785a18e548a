"""What `data inspect` says about a set."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from megatron_r1reward.cli import app


def test_figures_and_rows_as_the_model_reads_them(tmp_path: Path, tiny_folder: Path) -> None:
    Image.new("RGB", (280, 140), "red").save(tmp_path / "a.png")
    rows = [
        {"id": "one", "prompt": "Which <b>?", "chosen": "longer answer", "rejected": "no", "image": "a.png"},
        {"id": "again", "prompt": "which  <B>?", "chosen": "no", "rejected": "Longer answer", "image": "a.png"},
        {"id": "text", "prompt": "Why?", "chosen": "x " * 4000, "rejected": "y"},
    ]
    source, other = tmp_path / "rows.jsonl", tmp_path / "bench.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text(json.dumps([rows[0], {**rows[2], "chosen": "other"}]))
    (tmp_path / "run.toml").write_text(
        f'[run]\noutput_dir = "{tmp_path}/out"\n[model]\npath = "{tiny_folder}"\n[data]\ntrain = "{source}"\n'
        "[rollout]\nmax_model_len = 2000\n"
    )
    page = tmp_path / "page.html"
    command = ["data", "inspect", str(source), "--out", str(page), "--run-file", str(tmp_path / "run.toml")]
    result = CliRunner().invoke(app, [*command, "--against", str(other)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    html = page.read_text()
    for text in (result.output, html):
        assert "first 3, second 0" in text
        assert "66.7%" in text  # the better one is the longer one in two of three
        assert "0: 1, 1: 2" in text  # images in a row
        assert "2 rows as a pair with its images, 3 by their question" in text
        assert "280 x 140, 50 tokens" in text
        assert "set aside" in text
    assert "Which &lt;b&gt;?" in html
    assert html.count("<img src=") == 2
    assert html.count("data:image/svg+xml;base64,") == 1  # the picture of labels, order and lengths
    assert "rollout.max_model_len is 2000" in html
