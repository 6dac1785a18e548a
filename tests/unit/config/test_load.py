"""Run files: overrides, unknown keys, impossible values, and the round trip through the run directory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import ValidationError

from megatron_r1reward.config.load import dump_config, load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.config.section import Section

MINIMAL = """
[run]
output_dir = "runs/x"
[model]
path = "model"
[data]
train = "train.jsonl"
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_overrides_apply_left_to_right(run_file):
    config = load_config(
        run_file, ["optimizer.lr=1e-4", "optimizer.lr=3e-4", "judge.model=abc", "evaluation.voting=[1,3]"]
    )
    assert config.optimizer.lr == 3e-4
    assert config.judge.model == "abc"
    assert config.evaluation.voting == (1, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("optimizer.warmup_fractoin=0.1", "did you mean 'warmup_fraction'?"),
        ("optimiser.lr=1", "did you mean 'optimizer'?"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("algorithm.filter=median", "algorithm.filter"),
        ("algorithm.baseline=group_mean", "samples_per_prompt > 1"),
        ("rl.train_batch_size=100", "not a multiple"),
        ("rl.dynamic_sampling_rounds=2", "algorithm.samples_per_prompt is 1"),
        ("asynchrony.mode=in_flight", "set algorithm.truncated_importance_sampling"),
        ("nonsense", "section.key=value"),
        *(
            (f"judge.{key}=1", f"judge.{key}: unknown key: it belongs to [rollout] and means nothing in [judge]")
            for key in (
                "sender_host",
                "weight_transport",
                "weight_bucket_bytes",
                "weights_once_per_host",
                "push_timeout_s",
                "keep_snapshot",
            )
        ),
        (
            'reward.terms=[{name="mine"}]',
            "'mine' is none of the built-in format, result, consistency, agreement: name its",
        ),
        ('reward.terms=[{name="mine",function="f"}]', "'f' of 'mine' is not of the form \"path/to/file.py:name\""),
        ('reward.terms=[{name="result",function="f.py:f"}]', "'result' is a built-in term: give the function another"),
        ('reward.terms=[{name="result"},{name="result"}]', "reward.terms names 'result' twice"),
        ('reward.terms=[{name="Mine",function="f.py:f"}]', "reward.terms.0.name"),
        ("optimizer.eps=-1", "optimizer.eps"),
        ("optimizer.beta2=1", "optimizer.beta2"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("reward.format_weight=-0.5", "reward.format_weight"),
        ("algorithm.entropy_coefficient=-1", "algorithm.entropy_coefficient"),
        ("algorithm.gamma=0", "algorithm.gamma"),
        ("data.max_pixels=100", "below data.min_pixels 3136"),
        ("rollout.backoff_max_s=0.1", "below backoff_s 0.5"),
        ("rollout.gpu_ids=[-1]", "negative number"),
        ("run.seed=-1", "run.seed"),
        ("sft.steps=true", "sft.steps: true and false are for switches, and this is none"),
        ("optimizer.lr=true", "optimizer.lr: true and false are for switches"),
        ("evaluation.voting=[1,true]", "evaluation.voting: true and false are for switches"),
        ("run.output_dir=false", "run.output_dir: true and false are for switches"),
    ],
)
def test_bad_values_name_the_key_and_the_fix(run_file, override, message):
    with pytest.raises(ValueError) as error:
        load_config(run_file, [override])
    assert message in str(error.value)


def test_asynchrony_needs_machines_of_its_own_and_one_batch_per_step(run_file):
    corrected = ["asynchrony.mode=one_step_off", "algorithm.truncated_importance_sampling=2.0"]
    assert load_config(run_file, corrected).asynchrony.max_staleness == 1
    with pytest.raises(ValueError, match="set layout to 'split'"):
        load_config(run_file, [*corrected, "cluster.layout=colocated"])
    with pytest.raises(ValueError, match="batches_ahead is 2: set it to 1"):
        load_config(run_file, [*corrected, "asynchrony.batches_ahead=2"])


def test_missing_file_and_bad_toml(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


def test_the_resolved_file_reads_back_equal(run_file, tmp_path):
    curriculum = "data.curriculum=[{until_step = 4, categories = ['a \"b\"']}, {accuracy = [0.1, 1.0]}]"
    config = load_config(
        run_file,
        ["optimizer.lr=3e-7", 'judge.urls=["http://a:1"]', 'judge.model=it\'s \\"quoted\\"', curriculum,
         "data.judgements=judged.jsonl"],
    )  # fmt: skip
    dump_config(config, tmp_path / "resolved.toml")
    assert load_config(tmp_path / "resolved.toml") == config


def test_terms_survive_the_resolved_file(run_file, tmp_path):
    terms = 'reward.terms=[{name="format",weight=0.5},{name="mine",weight=-1e-3,function="a b/\\"f\\".py:f"}]'
    config = load_config(run_file, [terms])
    assert [(term.name, term.weight, term.function) for term in config.reward.terms] == [
        ("format", 0.5, None),
        ("mine", -0.001, 'a b/"f".py:f'),
    ]
    dump_config(config, tmp_path / "resolved.toml")
    assert load_config(tmp_path / "resolved.toml") == config
    with pytest.raises(ValueError, match=r"reward.terms takes the place of reward.format_weight"):
        load_config(run_file, [terms, "reward.format_weight=0.4"])


def test_any_text_survives_the_resolved_file(run_file, tmp_path):
    text = 'run \U0001f600 "x" \\ \x7f \x1f é'
    config = load_config(run_file)
    config = config.model_copy(update={"run": config.run.model_copy(update={"output_dir": Path(text)})})
    dump_config(config, tmp_path / "resolved.toml")
    assert load_config(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temperature=0.005", r"sampling.temperature is 0.005: vLLM samples at 0.01 instead .*Set it to 0.01"),
        ("sampling.temperature=0.0", r"sampling.temperature is 0.0: .* greedy decoding draws none. Set it above 0"),
        ("sampling.top_p=0.9", r"sampling.top_p is 0.9: .* Set sampling.top_p = 1.0"),
        ("sampling.top_k=20", r"sampling.top_k is 20: .* Set sampling.top_k = 0"),
    ],
)
def test_rl_refuses_samples_whose_distribution_the_trainer_does_not_know(run_file, override, message):
    config = load_config(run_file, [override])  # evaluation may
    with pytest.raises(ValueError, match=message):
        config.sampling.check_for_rl()


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 1.5])
def test_rl_takes_any_temperature(run_file, temperature):
    sampling = load_config(run_file, [f"sampling.temperature={temperature}"]).sampling
    sampling.check_for_rl()
    assert sampling.tempered is (temperature != 1.0)


def _numbers(model: type[Section]) -> Iterator[tuple[str, bool]]:
    """Names of the numeric keys of a section, and whether they take fractions."""
    for name, field in model.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        kinds |= {get_args(kind)[0] for kind in kinds if get_origin(kind) is Annotated}
        if kinds & {int, float}:
            yield name, float in kinds


def test_no_number_of_any_section_may_be_infinite_nan_or_negative() -> None:
    """Not the ones that somebody thought of: all."""
    seen = 0
    accepted = []
    required = {"output_dir": "o", "path": "p", "train": "t"}
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        base = {name: required[name] for name in model.model_fields if name in required}
        for name, fraction in _numbers(model):
            seen += 1
            for value in [-1, *([math.inf, -math.inf, math.nan] if fraction else [])]:
                try:
                    model.model_validate({**base, name: value})
                except ValidationError:
                    continue
                accepted.append(f"{section}.{name} = {value}")
    assert accepted == []
    assert seen > 100
