"""The data card of the digits data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

_CARD = """\
# Preferences about handwritten digits

Questions about images of one to three real handwritten digits, each with a right and a wrong response. The two
responses of a row are equally likely given their text: only the image says which one is right.

| file | rows | content |
|---|---|---|
| `sft.jsonl` | {{ rows.sft }} | preferences with a target `response`: reasoning and answer |
| `pool.jsonl` | {{ rows.pool }} | preferences for difficulty annotation and RL |
{% if rows.pool_unlabelled is defined %}\
| `pool_unlabelled.jsonl` | {{ rows.pool_unlabelled }} | two wrong or near-equal responses each, without a label |
{% endif %}\
| `heldout.jsonl` | {{ rows.heldout }} | preferences on source pictures that the two files above never show |
| `judge_sft.jsonl` | {{ rows.judge_sft }} | text only: does a reasoning support a verdict? "1" or "0" |
| `judge_heldout.jsonl` | {{ rows.judge_heldout }} | the same, other texts |

Seed {{ seed }}. {{ images }} images in `images/`, named by their source pictures: training draws on
{{ train_pictures }} pictures, held-out rows on {{ heldout_pictures }} others. Labels are 1:1 in every file, in random
order. No preference repeats another's image, question and pair of answers; the judge's rows may repeat each other.
{% if annotator_error_rate %}
The annotator of `sft.jsonl` is fallible: {{ "%.0f" % (100 * annotator_error_rate) }} % of its reasonings argue for the
wrong response.
{% endif %}
## Rows by category
{% for name, counts in categories.items() %}
`{{ name }}.jsonl`: {% for category, count in counts.items() %}{{ category }} {{ count }}{{ ", " if not loop.last }}\
{% endfor %}.
{% endfor %}
## Source and licence

The digits are those of `sklearn.datasets.load_digits` (1,797 pictures of 8 by 8 pixels), a copy of the test set of
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49, under CC BY 4.0. Here each is enlarged to 56 by 56 pixels, black on white, and set beside others;
questions, responses and reasonings are written by a program. Keep this notice with copies.
"""


def data_card(summary: Mapping[str, Any]) -> str:
    """Markdown text for the fields of a `DigitsSummary`."""
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(_CARD).render(summary)
