"""`r1reward data inspect`: what a set of preferences looks like, and some of its rows as the model will read them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from megatron_r1reward.data.image_files import data_url, upright_size
from megatron_r1reward.data.importing import import_preferences, thumbnails_of
from megatron_r1reward.data.near_duplicates import Seen, pair_key, pictures_of, question_key
from megatron_r1reward.data.prompt import messages_of
from megatron_r1reward.data.stage_data import RowLimits
from megatron_r1reward.files import write_text
from megatron_r1reward.report.balance_chart import balance_url
from megatron_r1reward.types import Preference

_MEASURED = 1000  # rows whose tokens are counted
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; } pre { white-space: pre-wrap; }
section { border-top: 1px solid #999; padding: 1rem 0; } img { max-width: 20rem; margin-right: .5rem; }
</style><h1>{{ title }}</h1><img style="max-width: 100%" src="{{ picture }}" alt="labels, order and lengths"><table>
{% for name, value in statistics.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% for row in rows %}<section><h2>{{ row.id }}</h2><p>better: Response {{ row.label }}
{% if row.lengths %}, {{ row.lengths }}{% endif %}</p>
{% for image in row.images %}<figure style="display:inline-block"><img src="{{ image.url }}" alt="">
<figcaption>{{ image.caption }}</figcaption></figure>{% endfor %}<pre>{{ row.text }}</pre></section>{% endfor %}</html>
"""


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    url: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A row as the model reads it; `lengths` is empty without a model."""

    id: str
    label: int
    text: str
    lengths: str
    images: tuple[ShownImage, ...]


def inspect_source(
    source: str,
    page: Path,
    *,
    schema: str = "auto",
    image_root: Path | None = None,
    split: str = "train",
    rows: int = 20,
    limits: RowLimits | None = None,
    against: Sequence[str] = (),
) -> dict[str, str]:
    """Write `page`, one HTML file, print its figures, and return them.

    Args:
        rows: shown, evenly spaced over the set.
        limits: of a model and a stage; without it tokens are not counted.
        against: benchmarks or other sets that the rows are looked for in.

    Raises:
        ValueError: a source cannot be read, see `import_preferences`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        read = import_preferences(source, Path(scratch) / "set", schema=schema, image_root=image_root, split=split,
                                  order="stored")  # fmt: skip
        preferences = read.preferences
        statistics = {"rows": str(len(preferences)), "set aside": str(read.quarantined), **_statistics(read.account)}
        statistics["distinct questions"] = str(len({row.question.casefold().strip() for row in preferences}))
        for number, other in enumerate(against):
            held = import_preferences(other, Path(scratch) / f"other-{number}", order="stored").preferences
            statistics[f"also in {other}"] = _overlap(preferences, held)
        if limits is not None:
            statistics |= _token_statistics(preferences, limits)
        places = sorted({round(place) for place in np.linspace(0, len(preferences) - 1, min(rows, len(preferences)))})
        shown = [_shown(preferences[place], limits) for place in places]
    title = f"{source}: {len(preferences)} preferences"
    template = Environment(autoescape=True).from_string(_PAGE)
    picture = balance_url(read.account["balance"])
    write_text(page, template.render(title=title, statistics=statistics, rows=shown, picture=picture))
    _print(Console(), title, statistics, shown)
    return statistics


def _statistics(account: Mapping[str, Any]) -> dict[str, str]:
    """What the import counted, in words."""
    balance = account["balance"]
    found = {
        "better response": f"first {balance['labels']['1']}, second {balance['labels']['2']}",
        "better response is the longer one": f"{balance['longer_is_better'] / account['rows']:.1%}",
        "images in a row": ", ".join(f"{number}: {count}" for number, count in balance["images"].items()),
        "pairs that occur again (either order, same images)": str(account["duplicates"]),
        "pairs one word from an earlier one": str(account["near_duplicates"]),
    }
    for name in ("categories", "sources"):
        if balance[name]:
            found[name] = ", ".join(f"{value}: {count}" for value, count in list(balance[name].items())[:12])
    return found


def _token_statistics(preferences: Sequence[Preference], limits: RowLimits) -> dict[str, str]:
    """Lengths of at most `_MEASURED` rows, evenly spaced."""
    places = np.unique(np.linspace(0, len(preferences) - 1, min(_MEASURED, len(preferences))).round().astype(int))
    rows = [preferences[place] for place in places]
    text = np.array([limits.prompt_length(row) for row in rows])
    images = np.array([sum(map(limits.image_tokens, row.image_paths)) for row in rows])

    def spread(values: np.ndarray) -> str:
        return f"median {np.median(values):.0f}, 95 % {np.percentile(values, 95):.0f}, most {values.max()}"

    too_long = sum(bool(limits.preference(row)) for row in rows)
    return {
        "tokens of text in the prompt": spread(text),
        "tokens of images": spread(images),
        f"too long for the limits (of {len(rows)} rows)": str(too_long),
    }


def _overlap(preferences: Sequence[Preference], held: Sequence[Preference]) -> str:
    ours, theirs = thumbnails_of(preferences), thumbnails_of(held)
    pairs = Seen((pair_key(row), pictures_of(row, theirs)) for row in held)
    asked = Seen((question_key(row), pictures_of(row, theirs)) for row in held)
    same = sum(pairs.holds(pair_key(row), pictures_of(row, ours)) for row in preferences)
    question = sum(asked.holds(question_key(row), pictures_of(row, ours)) for row in preferences)
    return f"{same} rows as a pair with its images, {question} by their question about the same images"


def _shown(row: Preference, limits: RowLimits | None) -> ShownRow:
    lengths, captions = "", [f"{width} x {height}" for width, height in map(upright_size, row.image_paths)]
    if limits is not None:
        tokens = [limits.image_tokens(path) for path in row.image_paths]
        captions = [f"{caption}, {count} tokens" for caption, count in zip(captions, tokens, strict=True)]
        lengths = f"{limits.prompt_length(row)} tokens of text, {sum(tokens)} of images"
        problem = limits.preference(row)
        lengths += f"; set aside: {problem}" if problem else ""
    content = messages_of(row)[0]["content"]
    return ShownRow(
        id=row.id,
        label=row.known_label,
        text="".join(part["text"] if part["type"] == "text" else "[image]\n" for part in content),
        lengths=lengths,
        images=tuple(
            ShownImage(url=data_url(path), caption=caption)
            for path, caption in zip(row.image_paths, captions, strict=True)
        ),
    )


def _print(console: Console, title: str, statistics: Mapping[str, str], rows: Sequence[ShownRow]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in statistics.items():
        table.add_row(name, value)
    console.print(title, markup=False, highlight=False)
    console.print(table)
    for row in rows[:3]:
        images = ", ".join(image.caption for image in row.images) or "no image"
        text = f"\n{row.id}: better is Response {row.label}; {images}; {row.lengths}\n{row.text}"
        console.print(text, markup=False, highlight=False)
