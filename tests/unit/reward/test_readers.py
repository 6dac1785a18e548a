"""A parser of the user's: from the run file into training, into the folder, and out of it only where it is trusted."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1reward.config.schema import RewardSection, RunConfig
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.served import asked_by
from megatron_r1reward.launch.stage_models import model_problems
from megatron_r1reward.launch.stages import annotate
from megatron_r1reward.model_folder.prompt_policy import FILE, CarriedParser, PromptPolicy, read_policy
from megatron_r1reward.reward.readers import reader_of, users_reader
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.training.trained_policy import rl_policy
from megatron_r1reward.types import Prompt, Rollout
from megatron_r1reward.user_parts import Part, PartError

PARTS = Path(__file__).parents[3] / "recipes" / "parts"
POINTWISE = f"{PARTS / 'pointwise.py'}:verdict"


def config_of(folder: Path, **sections: dict[str, object]) -> RunConfig:
    tree: dict[str, dict[str, object]] = {
        "run": {"output_dir": "unused"}, "model": {"path": folder}, "data": {"train": "unused"}, "rl": {},
        "reward": {"use_judge": False},
    }  # fmt: skip
    return RunConfig.model_validate(tree | sections)


def response(text: str) -> Rollout:
    prompt = Prompt(id="p", preference_id="p", token_ids=(1,), image_paths=(), label=1, swapped=False)
    return Rollout(
        prompt=prompt, sample_index=0, token_ids=(1,), log_probs=(0.0,), text=text, finish_reason="stop",
        weight_spans=(),
    )  # fmt: skip


def test_the_shipped_pointwise_parser_trains(tmp_path: Path) -> None:
    read = reader_of(config_of(tmp_path, prompt={"parser": POINTWISE}))
    texts = ["<think>x</think><answer>9, 4</answer>", "<think>x</think><answer>3,10</answer>", "<answer>5, 5</answer>"]
    scored, counts = RewardScorer(RewardSection(use_judge=False), None, read=read).score(list(map(response, texts)))
    assert [one.predicted for one in scored] == [1, 2, None]
    assert [one.reward for one in scored] == [1.5, 0.5, 0.0]
    assert counts["unparsable"] == 1


def test_a_folder_carries_prompt_and_parser_and_code_runs_where_it_is_trusted(tmp_path: Path) -> None:
    config = config_of(tmp_path, prompt={"template": PARTS / "pointwise.txt", "parser": POINTWISE})
    policy = rl_policy(config, rows=1)
    assert policy.template == (PARTS / "pointwise.txt").read_text()
    (tmp_path / FILE).write_text(policy.to_json())
    carried = read_policy(tmp_path)
    assert carried == policy

    with pytest.raises(ValueError, match=r"carries code that reads its verdicts .*--trust-parser"):
        asked_by(carried, AskOptions())
    options = asked_by(carried, AskOptions(trust_parser=True))
    assert options.prompt.template == policy.template
    assert options.prompt.read("<answer>2, 8</answer>") == 2
    assert options.log_probs is False, "no token holds the verdict"

    later = config_of(tmp_path)
    with pytest.raises(ValueError, match=r"name its file as prompt\.parser, or set prompt\.trust_parser=true"):
        reader_of(later)
    trusted = config_of(tmp_path, prompt={"trust_parser": True})
    for known in (trusted, config):
        read = reader_of(known)
        assert read is not None
        assert read("<answer>2, 8</answer>") == 2
    assert rl_policy(trusted, rows=1).parser == policy.parser, "the next stage's folder carries it on"


def test_a_parser_by_name_is_no_code(tmp_path: Path) -> None:
    policy = PromptPolicy(template="{question}{answer1}{answer2}", parser=CarriedParser(name="boxed"))
    assert asked_by(policy, AskOptions()).prompt.read(r"\boxed{2}") == 2
    read = reader_of(config_of(tmp_path, prompt={"parser": r"better: (\d)"}))
    assert read is not None
    assert read("better: 1, no, better: 2") == 2
    assert reader_of(config_of(tmp_path)) is None
    with pytest.raises(ValueError, match=r"prompt.parser '\(' is no regular expression"):
        reader_of(config_of(tmp_path, prompt={"parser": "("}))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("return 3", "returned 3 for the response 'say': return 1, 2 or None"),
        ("return True", "returned True for"),
        ("return '1'", "returned '1' for"),
        ("return text[10]", "failed at the response 'say' (line 2: IndexError: string index out of range): mend the"),
    ],
)  # fmt: skip
def test_what_a_parser_does_wrong_is_one_line(source: str, reason: str) -> None:
    read = users_reader(Part(key="prompt.parser", name="p.py:read", source=f"def read(text):\n    {source}\n"))
    with pytest.raises(PartError) as error:
        read("say")
    assert str(error.value).startswith("prompt.parser 'p.py:read' ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def problems(config: RunConfig, stage: str) -> list[str]:
    found = model_problems(config, stage)  # type: ignore[arg-type]
    return [f"{key} {path}: {text}" for key, path, text in found if "config.json" not in text]


def test_parts_are_examined_before_anything_starts(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text('{question} {answer1} {answer2} {"json": 1}')
    (tmp_path / "f.py").write_text("def f(rows): return []\n")
    config = config_of(
        tiny_folder,
        prompt={"template": tmp_path / "bad.txt", "parser": "nowhere.py:read"},
        reward={"use_judge": False, "terms": [{"name": "mine", "function": f"{tmp_path}/f.py:g"}]},
    )
    template, parser, term = problems(config, "rl")
    assert template.startswith(
        f"prompt.template {tmp_path}/bad.txt: a template holds each of {{question}}, {{answer1}}"
    )
    assert (
        parser == "prompt.parser nowhere.py:read: nowhere.py cannot be read (No such file or directory): check the path"
    )
    assert term == f"reward.terms 'mine' {tmp_path}/f.py:g: {tmp_path}/f.py has no function 'g': it has f"
    assert problems(config_of(tiny_folder), "rl") == []


def test_an_evaluation_asks_as_the_model_was_trained(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    own = {"template": PARTS / "pointwise.txt", "parser": POINTWISE}
    policy = rl_policy(config_of(folder, prompt=own), rows=1)
    (folder / FILE).write_text(policy.to_json())
    assert problems(config_of(folder, prompt=own), "eval") == []
    other = {"template": PARTS / "rubric.txt", "parser": "answer"}
    first, second = problems(config_of(folder, prompt=other), "eval")
    assert "has the prompt of its training, and prompt.template" in first
    assert "says that verdicts are read by" in second
    (folder / FILE).write_text(replace_parser(policy))
    assert (
        "prompt.parser 'boxed' is another: remove it"
        in problems(config_of(folder, prompt={"parser": "boxed"}), "eval")[0]
    )


def test_annotate_asks_and_reads_as_published(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {"train": tmp_path / "rows.jsonl"}
    for own, part in (({"template": PARTS / "rubric.txt"}, "prompt"), ({"parser": POINTWISE}, "parser")):
        with pytest.raises(ValueError, match=f"has a {part} of its own, and annotate asks and reads as published"):
            annotate(config_of(tiny_folder, prompt=own, data=data))


def replace_parser(policy: PromptPolicy) -> str:
    return policy.model_copy(update={"parser": None}).to_json()
