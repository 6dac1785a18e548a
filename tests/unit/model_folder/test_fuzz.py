"""Small random changes of what a user hands over end in a right reading or in one line of message, never in a
traceback or in silence. Seeded: a failure names its change."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import config, metas, write_folder, write_weights

from megatron_r1reward.config.load import load_config
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder.examine import folder_problems
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.shape import ModelShape, load_shape, read_shape

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, float("nan"), "", "x", "64", [], [1], {}, {"a": 1}, "\ud800", "é" * 300
)  # fmt: skip
NESTED = "[" * 200 + "]" * 200


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, value in items for place in places(value, (*path, key))]


def mutate(tree: Any, generator: random.Random) -> Any:
    """One change: a value replaced, a key removed, added or renamed."""
    tree = copy.deepcopy(tree)
    *parents, last = generator.choice(places(tree))
    node = tree
    for key in parents:
        node = node[key]
    kind = generator.choice(("value", "value", "remove", "rename", "add"))
    if kind == "value" or isinstance(node, list):
        node[last] = generator.choice(ODD_VALUES)
    elif kind == "remove":
        del node[last]
    elif kind == "rename":
        node[f"{last}_"] = node.pop(last)
    else:
        node[f"new_{generator.randrange(9)}"] = generator.choice(ODD_VALUES)
    return tree


def damage(text: str, generator: random.Random) -> str:
    """A few characters less, more or other ones."""
    at = generator.randrange(len(text))
    return generator.choice(
        (text[:at], text[:at] + text[at + 1 :], text[:at] + generator.choice('{}[]",:\x00é') + text[at:], NESTED)
    )


def one_line_or_right(action: Callable[[], None], what: object) -> bool:
    """Whether it went well; else the message is a line that names something."""
    try:
        action()
    except ValueError as error:
        text = str(error)
        assert text, what
        assert len(text) > 15, (what, text)
        return False
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error} after {what}")
    return True


def examined(folder: Path) -> ModelShape:
    if problems := list(folder_problems(folder)):
        raise ValueError("; ".join(problems))
    return load_shape(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_configuration(family: str, tmp_path: Path) -> None:
    generator, folder = random.Random(family), write_folder(tmp_path, family)
    original = read_shape(config(family))
    kept = 0
    for number in range(250):
        tree = mutate(config(family), generator)
        (folder / "config.json").write_text(json.dumps(tree))

        def read(tree: Any = tree) -> None:
            shape = examined(folder)  # not merely accepted: it says what the unchanged one says
            assert shape.text.layers == original.text.layers, tree
            assert shape.vision.hidden == original.vision.hidden, tree

        kept += one_line_or_right(read, (number, tree))
    for number in range(100):
        text = damage(json.dumps(config(family)), generator)
        (folder / "config.json").write_text(text)
        one_line_or_right(lambda: examined(folder), (number, text))
    assert 10 < kept < 240, "both ends are reached"


def test_an_index_and_a_header(tmp_path: Path) -> None:
    generator, folder = random.Random(1), write_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    parts, names = metas(config()), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, some in zip(names, (parts[::2], parts[1::2]), strict=True):
        write_weights(folder, some, name)
    files = [st.read_file(folder / name) for name in names]
    index, good = json.loads(st.index_text(files)), 0
    for number in range(200):
        tree = mutate(index, generator)
        text = damage(json.dumps(tree), generator) if number % 4 == 0 else json.dumps(tree)
        (folder / st.INDEX).write_text(text)
        good += one_line_or_right(lambda: read_folder_weights(folder) and None, (number, text[:300]))
    assert good < 150
    (folder / st.INDEX).write_text(json.dumps(index))
    content = (folder / names[0]).read_bytes()
    for number in range(200):
        changed = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(files[0].data_start)] = generator.randrange(256)
        (folder / names[0]).write_bytes(changed[: generator.choice((len(changed), generator.randrange(len(changed))))])
        one_line_or_right(lambda: read_folder_weights(folder) and None, (number, bytes(changed[:200])))


def test_a_data_row(tmp_path: Path) -> None:
    generator = random.Random(2)
    row = {"id": "a", "question": "2 + 2?", "response_1": "4", "response_2": "5", "answer": 2, "images": []}
    lines = []
    for number in range(300):
        text = json.dumps(mutate(row | {"id": f"row-{number}"}, generator))
        lines.append(damage(text, generator).replace("\n", " ") if number % 4 == 0 else text)
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([*lines, json.dumps(row)]).encode("utf-8", errors="surrogatepass"))
    result = read_preferences(path, quarantine=tmp_path / "quarantine.jsonl")
    assert len(result.preferences) + result.quarantined == sum(bool(line.strip()) for line in [*lines, "row"])
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert all(len(reason) > 8 and "Traceback" not in reason for reason in reasons)
    assert 20 < result.quarantined < 290


def test_a_run_file(tmp_path: Path) -> None:
    generator = random.Random(3)
    text = (Path(__file__).parents[3] / "recipes/demo/rl.toml").read_text()
    path, good = tmp_path / "run.toml", 0
    lines = text.splitlines()
    for number in range(150):
        changed = list(lines)
        at = generator.randrange(len(changed))
        key, separator, _ = changed[at].partition(" = ")
        if separator and number % 3:
            value = generator.choice(
                ('"x"', "-1", "0", "true", "[]", "1e400", "nan", "{}", "'\\ud800'", "99999999999999999999")
            )
            changed[at] = key + separator + value
        else:
            changed[at] = damage(changed[at] or " ", generator)
        path.write_text("\n".join(changed))
        good += one_line_or_right(lambda: load_config(path) and None, (number, changed[at]))
    assert 5 < good < 145
