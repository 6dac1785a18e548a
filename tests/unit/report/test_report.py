from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from megatron_r1reward.evaluation.result import (
    CalibrationBin,
    CategoryAccuracy,
    Counts,
    EvaluationResult,
    FittedCalibration,
    GreedyAccuracy,
    JudgedSamples,
    PairKind,
    Transcript,
    VoteBudget,
    VotingPoint,
    one,
    several,
)
from megatron_r1reward.evaluation.statistics import Estimate
from megatron_r1reward.evaluation.vote_budget import JUDGE_FILTERED
from megatron_r1reward.report.charts import Chart, Series, draw, draw_timeline
from megatron_r1reward.report.report import build_report
from megatron_r1reward.report.vote_charts import draw_reliability, draw_votes, judged_votes

VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}
KS = (1, 5, 15)


def around(mean: float, half_width: float = 0.03) -> Estimate:
    return Estimate(mean=mean, low=mean - half_width, high=mean + half_width)


def evaluation(accuracy: float, image: Path, *, shuffled: bool = False) -> EvaluationResult:
    """A plausible result; the transcripts are right when the accuracy is above 0.8."""
    answer, other = (1, "a 3") if accuracy > 0.8 else (2, "an 8")
    reasoning = f"The image shows {other}.\nResponse 1 says 3 & <b>Response 2</b> says 8."
    text = f"<think>{reasoning}</think><answer>{answer}</answer>"
    transcripts = tuple(
        Transcript(
            preference_id=f"pair-{index}",
            category="digit",
            order="12" if index % 2 else "21",
            question="Which digit is it? <script>alert(1)</script>",
            responses=("It is 3.", "It is 8."),
            label=1,
            image_paths=(str(image),),
            text=text,
            answer=1 if answer == 1 else 2,
        )
        for index in range(5)
    )

    def figures(value: float) -> dict[str, Any]:
        return dict(
            **one("accuracy", around(value), "interval"),
            **several("accuracy_by_order", {"12": around(value - 0.02), "21": around(value + 0.02)}),
            **one("order_consistency", around(value - 0.04)),
            **one("unparsable_rate", around(0.01)),
            **one("format_rate", around(0.99)),
            answer_1_rate=0.505,
        )

    return EvaluationResult(
        **figures(accuracy),
        **several("voting", {str(k): around(accuracy + 0.001 * k, 0.025) for k in KS}),
        **several("any_correct", {str(k): around(1 - (1 - accuracy) ** k, 0.01) for k in KS}),
        **one("mean_response_tokens", Estimate(mean=31.5, low=31.0, high=32.1)),
        by_category={
            name: CategoryAccuracy(accuracy=accuracy + shift, interval=around(accuracy + shift).interval, pairs=count)
            for name, shift, count in (("digit", 0.02, 280), ("sum", -0.03, 200))
        },
        counts=Counts(pairs=480, samples=14_400, failed=0),
        transcripts=transcripts,
        shuffled_images=shuffled,
        greedy=GreedyAccuracy(**figures(accuracy + 0.01), counts=Counts(pairs=480, samples=960, failed=0)),
        pair_kinds=(
            PairKind(
                kind="wrong against wrong",
                pairs=100,
                first_place=0.752,
                first_place_interval=(0.7, 0.8),
                order_agreement=0.393,
                order_agreement_interval=(0.3, 0.5),
            ),
        ),
    )


def rl_row(step: int, noise: np.random.Generator) -> dict[str, Any]:
    progress = 1 - np.exp(-step / 30)
    jitter = 0.04 * noise.standard_normal(6)
    row = {
        "step": step,
        "time": 1.7e9 + step,
        "reward/mean": 1.1 + 0.6 * progress + jitter[0],
        "reward/result": 0.62 + 0.25 * progress + jitter[1],
        "reward/consistency": 0.55 + 0.25 * progress + jitter[2],
        "reward/format": min(1.0, 0.94 + 0.06 * progress + 0.1 * jitter[3]),
        "response/mean_tokens": 36 - 5 * progress + 10 * jitter[4],
        "advantage/filtered_positive": 0.0,
        "advantage/filtered_negative": max(0.0, 0.04 * progress + 0.2 * jitter[5]),
        "ratio/preclipped_fraction": 0.0,
        "ratio/clipped_fraction": 0.02 * progress,
        "mismatch/max_abs": None if step == 7 else 3e-5 * (1 + 20 * progress) * np.exp(10 * jitter[0]),
        "mismatch/mean_abs": 2e-6 * (1 + 20 * progress),
        "rollout/answer_1_fraction": 0.5 + jitter[2],
        "rollout/unparsable_fraction": 0.05 * (1 - progress),
        "entropy": 0.35 - 0.2 * progress,
        "grad_norm": 1.5 - 0.6 * progress + jitter[1],
    }
    return row | ({"heldout/accuracy": 0.6 + 0.25 * progress} if step % 20 == 0 else {})


def write_run(folder: Path) -> Path:
    """A finished run of 120 RL steps."""
    image = folder / "image.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((112, 56)).convert("RGB").save(image)
    noise = np.random.default_rng(0)
    sft = [
        {"step": step, "sft/loss": 2 * np.exp(-step / 20), "entropy": 0.4 + np.exp(-step / 20), "grad_norm": 1.0}
        for step in range(1, 61)
    ]
    control = evaluation(0.51, image, shuffled=True)
    files: Mapping[str, Any] = {
        "eval_sft/evaluation.json": evaluation(0.66, image).model_dump(mode="json"),
        "eval_rl/evaluation.json": evaluation(0.87, image)
        .model_copy(update={"control": control})
        .model_dump(mode="json"),
        "timing.json": {"phases": {"data": 12.0, "sft": 210.0, "rl": 540.5, "evaluation": 60.0}, "wall_seconds": 840.0},
        "difficulty.json": {"1": 700, "2": 180, "3": 60, "never": 60},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for name, rows in {"sft": sft, "rl": [rl_row(step, noise) for step in range(1, 121)]}.items():
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "digits")


class Page(HTMLParser):
    """Checks that tags nest, and collects text and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_json_has_the_promised_keys(run_dir: Path) -> None:
    returned = build_report(run_dir)
    report = json.loads((run_dir / "report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert report["sft"]["accuracy"] == 0.66
    assert report["rl"]["accuracy"] == 0.87
    assert report["rl"]["interval"] == pytest.approx([0.84, 0.90])
    assert set(report["rl"]["voting"]) == set(report["rl"]["any_correct"]) == {"1", "5", "15"}
    assert report["rl"]["format_rate"] == 0.99
    assert report["rl"]["consistency_rate"] == pytest.approx(0.83)
    assert report["rl"]["mean_response_tokens"] == 31.5
    assert set(report["sft"]) == set(report["rl"])
    assert report["control"]["shuffled_images"]["accuracy"] == 0.51
    assert report["heldout_pairs"] == 480
    assert report["mismatch"]["step0_max_abs"] == rl_row(1, np.random.default_rng(0))["mismatch/max_abs"]
    assert report["wall_seconds"] == 840.0
    assert set(report["versions"]) >= {"python", "torch", "megatron-core", "vllm", "transformers"}
    assert report["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", report["commit"])
    assert not list(run_dir.glob(".report*"))  # no temporary file is left


@pytest.mark.slow
def test_page_is_one_file_and_shows_the_run(run_dir: Path) -> None:
    build_report(run_dir)
    html = (run_dir / "report.html").read_text()
    page = Page(html)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", html)  # what the model or the data says is text, not markup
    assert "<script>alert(1)</script>" in page.text
    for shown in ("87.0 %", "+21.0 points over SFT", "voting@15", "Held-out accuracy", "51.0 %", "✓ right", "✗ wrong"):
        assert shown in page.text
    assert page.tags.count("article") == 5
    assert page.tags.count("figure") == 12


@pytest.mark.slow
def test_images_of_the_transcripts_are_embedded(run_dir: Path) -> None:
    build_report(run_dir)
    html = (run_dir / "report.html").read_text()
    assert base64.b64encode((run_dir / "image.png").read_bytes()).decode() in html
    (run_dir / "image.png").unlink()
    with pytest.raises(ValueError, match=r"image of transcript 'pair-0' cannot be read.*image\.png"):
        build_report(run_dir)


def test_all_missing_files_are_named(run_dir: Path) -> None:
    (run_dir / "timing.json").unlink()
    (run_dir / "rl/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lacks rl/metrics\.jsonl, timing\.json: finish the run"):
        build_report(run_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("timing.json", "{", "timing.json is not what the report expects"),
        ("timing.json", '{"phases": {}}', "wall_seconds"),
        ("eval_rl/evaluation.json", "{}", "accuracy"),
        ("difficulty.json", '{"1": "many"}', "difficulty.json"),
        ("sft/metrics.jsonl", "", "has no rows"),
        ("rl/metrics.jsonl", '{"step": 1, "loss": 0.1}\n', "no mismatch/max_abs"),
    ],
)
def test_a_malformed_file_is_named(run_dir: Path, name: str, content: str, message: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build_report(run_dir)
    assert not (run_dir / "report.json").exists()


@pytest.mark.slow
def test_the_control_is_optional_and_its_absence_is_shown(run_dir: Path) -> None:
    path = run_dir / "eval_rl/evaluation.json"
    content = json.loads(path.read_text())
    del content["control"]
    path.write_text(json.dumps(content))
    assert build_report(run_dir)["control"]["shuffled_images"] is None
    assert "evaluation.shuffled_images_control = true" in (run_dir / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "values"),
    [
        ("linear", (1.0, None, 3.0)),
        ("share", (0.0, 0.0, 0.0)),
        ("accuracy", (0.4, 0.7)),
        ("log", (0.0, 1e-7, 1e-2)),
        ("linear", (5.0,)),
        ("linear", tuple(float(value) for value in range(100))),
    ],
)
def test_charts_draw_gaps_zeros_and_single_points(scale: Any, values: tuple[float | None, ...]) -> None:
    series = Series(label="curve", steps=tuple(range(len(values))), values=values)
    chart = Chart(title="T", note="n", series=(series,), scale=scale)
    drawing = draw(chart)
    head, encoded = drawing.image.split(",")
    assert head == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(encoded)).tag.endswith("svg")
    assert draw(chart) == drawing  # the same curves, the same bytes


def timeline(*, overlapped: bool) -> list[dict[str, Any]]:
    """Ten steps of four seconds: two of generation, two of training; overlapped, generation runs one step ahead."""
    rows = []
    for step in range(1, 11):
        start = 4.0 * step if not overlapped else 2.0 * step
        begin_training = start + 2.0
        rows += [
            {"step": step, "phase": "generate", "start": start, "end": start + 2.0},
            {"step": step, "phase": "score", "start": start + 1.9, "end": start + 2.0},
            {"step": step, "phase": "wait", "start": start, "end": begin_training},
            {"step": step, "phase": "update", "start": begin_training, "end": begin_training + 2.0},
            {"step": step, "phase": "step", "start": start, "end": begin_training + 2.0},
        ]
    return rows


@pytest.mark.parametrize(("overlapped", "share"), [(False, 0.0), (True, 0.9)])
def test_the_timeline_tells_whether_generation_overlapped_training(overlapped: bool, share: float) -> None:
    drawing = draw_timeline(timeline(overlapped=overlapped))
    assert drawing is not None
    assert drawing.overlap == pytest.approx(share)
    assert (drawing.first_step, drawing.last_step) == (3, 8)
    svg = base64.b64decode(drawing.image.split(",")[1]).decode()
    ElementTree.fromstring(svg)
    assert "servers: generate" in svg
    assert "trainer: update" in svg
    assert "trainer: push" not in svg  # a lane without a row
    assert ">5<" in svg  # bars carry their step


def test_every_server_has_a_lane() -> None:
    rows = timeline(overlapped=False)
    rows += [{**row, "phase": name} for row in rows if row["phase"] == "generate" for name in ("judge-0", "rollout-1")]
    drawing = draw_timeline(rows)
    assert drawing is not None
    svg = base64.b64decode(drawing.image.split(",")[1]).decode()
    assert svg.index("rollout-1") < svg.index("judge-0") < svg.index("servers: generate")


@pytest.mark.slow
def test_a_run_without_a_timeline_has_a_report_all_the_same(run_dir: Path) -> None:
    build_report(run_dir)
    assert "What ran when" not in (run_dir / "report.html").read_text()
    rows = timeline(overlapped=True)
    (run_dir / "rl/timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_report(run_dir)
    assert "What ran when, steps 3 to 8" in Page((run_dir / "report.html").read_text()).text
    assert draw_timeline(rows[:3]) is None


@pytest.mark.slow
def test_best_of_n_is_shown_with_its_interval_and_what_failed(run_dir: Path) -> None:
    assert build_report(run_dir)["best_of_n"] is None
    assert "In use" not in (run_dir / "report.html").read_text()
    found = {
        "images": 40,
        "candidates": 8,
        "right": 0.925,
        "right_interval": [0.8, 0.97],
        "judgements": 960,
        "failed": 1,
    }
    (run_dir / "use").mkdir()
    (run_dir / "use/best_of_n.json").write_text(json.dumps(found))
    assert json.loads(json.dumps(build_report(run_dir)["best_of_n"])) == found
    text = " ".join(Page((run_dir / "report.html").read_text()).text.split())
    assert "the right one came first for 92.5 % (80.0 \u2013 97.0) of the images; chance is 12.5 %" in text
    assert "24.0 judgements per image; 1 images got no reward and count as wrong" in text


@pytest.mark.slow
def test_pairs_without_a_better_response_are_shown_by_kind(run_dir: Path) -> None:
    report = build_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "<td>wrong against wrong</td><td>75.2 % / 39.3 %</td>" in page
    assert report["rl"]["pair_kinds"][0]["order_agreement"] == 0.393


@pytest.mark.slow
def test_ways_to_vote_are_shown_against_their_tokens(run_dir: Path) -> None:
    def point(method: str, setting: str, tokens: float) -> VotingPoint:
        interval = around(0.95).interval
        return VotingPoint(
            method=method, setting=setting, samples=tokens / 15, tokens=tokens, accuracy=0.95, interval=interval
        )

    build_report(run_dir)
    assert "Accuracy against generated tokens" not in (run_dir / "report.html").read_text()
    path, adaptive = run_dir / "eval_rl/evaluation.json", point("adaptive", "0.9", 45.0)
    budget = VoteBudget(
        points=(point("one order", "voting@15", 225.0), adaptive, point(JUDGE_FILTERED, "3 + 3", 90.0)),
        cheapest=adaptive,
        calibration_error=0.021,
        calibration=(CalibrationBin(confidence=0.75, accuracy=0.96, share=1.0),),
        fits=(
            FittedCalibration(
                aggregator="balanced", votes="adaptive 0.9", temperature=0.31, items=33, measured_items=32,
                error_before=0.24, error_after=0.02,
                bins_before=(CalibrationBin(confidence=0.75, accuracy=0.96, share=1.0),),
                bins_after=(CalibrationBin(confidence=0.95, accuracy=0.96, share=1.0),),
            ),
        ),
        judged=JudgedSamples(judge="judge/hf", consistent=900, inconsistent=90, unknown=10),
    )  # fmt: skip
    found = EvaluationResult.model_validate_json(path.read_text())
    path.write_text(found.model_copy(update={"vote_budget": budget}).to_json())
    assert build_report(run_dir)["rl"]["vote_budget"]["cheapest"]["tokens"] == 45.0
    text = " ".join(Page((run_dir / "report.html").read_text()).text.split())
    assert "Within the interval of voting@15 with the fewest tokens: adaptive (0.9), 20.0 % of its tokens." in text
    assert "expected calibration error 2.1 %" in text
    assert "adaptive 0.9balanced0.31 33 / 3224.0 %2.0 %" in text
    assert (
        "leave out the 90 of 1000 samples whose reasoning does not support the verdict, as judge/hf says (10 " in text
    )
    assert judged_votes(budget.model_copy(update={"judged": None, "not_judged": "it is off"})) == (
        "There are no judge-filtered votes: it is off."
    )
    assert "fitted on 33 items (temperature 0.31), shown on 32 others" in text
    for drawing in (draw_votes(budget), draw_reliability(budget.fits)):
        assert drawing is not None
        ElementTree.fromstring(base64.b64decode(drawing.image.split(",")[1]).decode())
        assert drawing.image in (run_dir / "report.html").read_text()
    assert draw_reliability(()) is None
