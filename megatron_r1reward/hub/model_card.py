"""The model card: README.md of a trained folder, written from what the run recorded and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.evaluation.result import (
    EvaluationResult,
    Interval,
    OrderAccuracy,
    ScalarEvaluation,
    parse_evaluation,
)
from megatron_r1reward.files import write_text
from megatron_r1reward.hub_name import hub_name
from megatron_r1reward.model_folder.prompt_policy import FILE, PromptPolicy, own_policy

CARD = "README.md"
_MARK = "<!-- written by `r1reward hub card` -->"

_TRANSFORMERS = '''import json
import re
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file

NAME = {name!r}
policy = json.loads(Path(cached_file(NAME, "{file}")).read_text())
processor = AutoProcessor.from_pretrained(NAME{pixels})
model = AutoModelForImageTextToText.from_pretrained(NAME, dtype="auto")


def judge(question, first, second, images):
    """"1" or "2", and the reply; `images` are paths. Ask with the responses exchanged, too."""
    text = policy["template"].format(question=question, answer1=first, answer2=second)
    content = [{{"type": "image", "image": Image.open(image).convert("RGB")}} for image in images]
    content.append({{"type": "text", "text": text}})
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=False)
    reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = re.search(r"<answer>\\s*([12])\\s*</answer>", reply)
    return (answer.group(1) if answer else None), reply
'''

_VLLM = '''import base64
import json
import re
from pathlib import Path

from openai import OpenAI
from transformers.utils import cached_file

NAME = {name!r}
policy = json.loads(Path(cached_file(NAME, "{file}")).read_text())
client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")


def judge(question, first, second, images):
    """As above; `images` are paths of PNG files."""
    text = policy["template"].format(question=question, answer1=first, answer2=second)
    urls = ["data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode() for image in images]
    content = [{{"type": "image_url", "image_url": {{"url": url}}}} for url in urls]
    content.append({{"type": "text", "text": text}})
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{{"role": "user", "content": content}}],
        temperature=0, max_tokens={max_tokens},
    ).choices[0].message.content
    answer = re.search(r"<answer>\\s*([12])\\s*</answer>", reply)
    return (answer.group(1) if answer else None), reply
'''


_GENERATIVE = (
    "A generative reward model: it reads a question, images and two responses, reasons in `<think>` and answers "
    "`<answer>1</answer>` or `<answer>2</answer>`. Trained with megatron_r1reward."
)
_SCALAR = (
    "A scalar reward model: it reads a question, images and one response, and gives it a number, the value of a head "
    "at the last token (`score.*` in the weights). The probability that one of two responses is better is the sigmoid "
    "of the difference. Trained with megatron_r1reward."
)
_POINTWISE = (
    "A pointwise reward model: it reads a question, images and one response, reasons in `<think>` and rates the "
    "response in `<answer>`, with a whole number from 1 to 10. Of two responses the one with the higher rating is the "
    "better one. Trained with megatron_r1reward."
)
_USE_ALONE = """## Use

With megatron_r1reward, which serves it with vLLM:

```python
from megatron_r1reward import RewardModel

with RewardModel.from_pretrained({name!r}) as model:
    print(model.score("Which?", ["The first.", "The second."], ["image.png"]))
```"""
_INPUT_SCALAR = """The input is one user turn (images, then the question) and the response as the assistant's turn with
the token that ends it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An `evaluation.json` of the folder's own weights."""

    path: Path
    result: EvaluationResult | ScalarEvaluation


def find_evaluations(folder: Path, given: Sequence[Path]) -> list[Evaluation]:
    """Those that are `given`, or else those in the folders beside the run that were measured on these very weights.

    Raises:
        ValueError: one that is given is none, or is of other weights.
    """
    weights = model_identity(folder)
    found = []
    for path in given or sorted(folder.resolve().parent.parent.glob("*/evaluation.json")):
        try:
            result = parse_evaluation(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if given:
                raise ValueError(f"--evaluation {path} is no evaluation.json of `r1reward eval`: {error}") from error
            continue
        if result.weights == weights:
            found.append(Evaluation(path=path, result=result))
        elif given:
            raise ValueError(
                f"--evaluation {path} was measured on other weights than those in {folder}: run `r1reward eval` with "
                f"model.path={folder}"
            )
    return found


def write_card(
    folder: Path, *, name: str | None, evaluations: Sequence[Path], licence: str | None, force: bool
) -> Path:
    """Write the card into the folder.

    Args:
        name: "org/name" under which it will be found; None: the snippets name the folder.

    Raises:
        ValueError: the folder is no reward model of ours, or holds a README.md that somebody else wrote.
    """
    policy = own_policy(folder)
    path = folder / CARD
    if path.exists() and not force and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{path} was not written by `hub card`: move it away, or give --force to replace it")
    found = find_evaluations(folder, evaluations)
    write_text(path, card_text(policy, name=name or str(folder), evaluations=found, licence=licence))
    return path


def card_text(policy: PromptPolicy, *, name: str, evaluations: Sequence[Evaluation], licence: str | None) -> str:
    """The card, Markdown with the Hub's metadata in front."""
    about = {"generative": _GENERATIVE, "pointwise": _POINTWISE, "scalar": _SCALAR}[policy.kind]
    use = {
        "generative": [_prompt(policy), _use(policy, name)],
        "pointwise": [_prompt(policy), _USE_ALONE.format(name=name)],
        "scalar": [_USE_ALONE.format(name=name), _INPUT_SCALAR],
    }[policy.kind]
    meta = [] if policy.kind == "scalar" else ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    meta += ["tags:", *(f"- {tag}" for tag in ("reward-model", "preference", "r1-reward", "megatron"))]
    if licence is not None:
        meta.append(f"license: {licence}")
    base = policy.stages[0].base if policy.stages else None
    if base is not None and (hub := hub_name(base)) is not None:
        meta.append(f"base_model: {hub[0]}")
    parts = [
        "\n".join(["---", *meta, "---", _MARK]),
        "# " + name.rstrip("/").rpartition("/")[2],
        about,
        _training(policy),
        _scores(evaluations),
        *use,
    ]
    return "\n\n".join(parts) + "\n"


def _training(policy: PromptPolicy) -> str:
    lines = ["## Training", "", "| stage | began with | data | rows | settings |", "| --- | --- | --- | ---: | --- |"]
    for stage in policy.stages:
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in stage.settings.items())
        lines.append(f"| {stage.stage} | {stage.base} | {stage.data} | {stage.rows or 'unknown'} | {settings} |")
    versions = sorted({stage.version for stage in policy.stages})
    return "\n".join([*lines, "", f"megatron_r1reward {', '.join(versions)}."])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scores(evaluations: Sequence[Evaluation]) -> str:
    lines = ["## Evaluation", ""]
    if not evaluations:
        return "\n".join([*lines, "None of these weights is recorded."])
    lines += [
        "Every pair in both orders of its responses; 95 % intervals.",
        "",
        "| held-out pairs | decoding | accuracy | better one first | better one second | orders agree | no verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for evaluation in evaluations:
        result = evaluation.result
        pairs = f"{result.data or evaluation.path.parent.name}, {result.counts.pairs} pairs"
        if isinstance(result, ScalarEvaluation):
            share = _share(result.accuracy, result.interval)
            missing = f"{result.unrated} of {result.calls} ratings" if result.kind == "pointwise" else ""
            lines.append(
                f"| {pairs} | a number per response | {share} | {share} | {share} | by construction | {missing} |"
            )
            continue
        lines.append(f"| {pairs} | sampled, one response | {_row(result)}")
        if result.greedy is not None:
            lines.append(f"| {pairs} | greedy | {_row(result.greedy)}")
        lines += [
            f"| {pairs} | voting@{k} | {_share(result.voting[k], result.voting_intervals[k])} | | | | |"
            for k in result.voting
            if k != "1"
        ]
    return "\n".join(lines)


def _row(result: OrderAccuracy) -> str:
    orders = [_share(result.accuracy_by_order[o], result.accuracy_by_order_intervals[o]) for o in ("12", "21")]
    cells = [
        _share(result.accuracy, result.interval),
        *orders,
        _share(result.order_consistency, result.order_consistency_interval),
        _share(result.unparsable_rate, result.unparsable_rate_interval),
    ]
    return " | ".join(cells) + " |"


def _share(value: float, interval: Interval) -> str:
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _prompt(policy: PromptPolicy) -> str:
    if policy.kind == "pointwise":
        orders = "It reads one response."
    elif policy.orders == "both":
        orders = "Ask in both orders of the responses: one order alone measures the model's taste for a place, too."
    else:
        orders = "It may be asked in one order."
    pixels = "" if policy.pixels is None else f" Images are scaled to {policy.pixels[0]} to {policy.pixels[1]} pixels."
    return "\n".join(
        [
            "## Prompt",
            "",
            f"One user turn, the images first. {orders}{pixels} `{FILE}` holds the template, byte for byte:",
            "",
            "````text",
            policy.template,
            "````",
        ]
    )


def _use(policy: PromptPolicy, name: str) -> str:
    pixels = "" if policy.pixels is None else f", min_pixels={policy.pixels[0]}, max_pixels={policy.pixels[1]}"
    limits = [stage.settings["max_tokens"] for stage in policy.stages if "max_tokens" in stage.settings]
    fill = {"name": name, "file": FILE, "pixels": pixels, "max_tokens": limits[-1] if limits else 1024}
    served = ""
    if policy.pixels is not None:
        kwargs = json.dumps({"min_pixels": policy.pixels[0], "max_pixels": policy.pixels[1]})
        served = f" --mm-processor-kwargs '{kwargs}'"
    return "\n".join(
        [
            "## Use",
            "",
            "With transformers:",
            "",
            f"```python\n{_TRANSFORMERS.format(**fill)}```",
            "",
            f"With vLLM, `vllm serve {name}{served}`:",
            "",
            f"```python\n{_VLLM.format(**fill)}```",
            "",
            "With megatron_r1reward, which asks in both orders, ranks and serves:",
            "",
            "```python",
            "from megatron_r1reward import RewardModel",
            "",
            f"with RewardModel.from_pretrained({name!r}) as model:",
            '    print(model.compare("Which?", ("The first.", "The second."), ["image.png"]).probability)',
            "```",
        ]
    )
