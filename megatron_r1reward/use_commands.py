"""The commands that use a trained model: `r1reward score`, `bench`, `serve`, `serve-labels`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_r1reward.model_folder.prompt_policy import own_policy, read_policy
from megatron_r1reward.run_files import Overrides, RunFile
from megatron_r1reward.types import ModelAccess
from megatron_r1reward.user_errors import check_file, user_errors

PromptOf = Annotated[
    Path | None, typer.Option(help="the folder that the servers at URLs serve: asked with its own prompt")
]
TrustParser = Annotated[bool, typer.Option("--trust-parser", help="run the code in its reward_model.json")]
_ACCESS_OPTIONS: Mapping[str, Any] = {  # of the fields of `ModelAccess`
    "model": Annotated[
        str, typer.Option(help="folder or ORG/NAME@REVISION, served here; or URLs of servers, with commas")
    ],
    "model_name": Annotated[str | None, typer.Option(help="at the URLs; default: the first that they list")],
    "servers": Annotated[int, typer.Option(help="vLLM servers to start for a model folder")],
    "max_tokens": Annotated[int, typer.Option(help="of one judgement")],
    "max_model_len": Annotated[int, typer.Option(help="of started servers: prompt, images and judgement")],
    "api_key_variable": Annotated[str, typer.Option(help="variable that holds the URL's key")],
    "prompt_of": PromptOf,
    "trust_parser": TrustParser,
}


def _asks_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of `ModelAccess` in place of its parameter `access`."""
    fields = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=_ACCESS_OPTIONS[field.name],
        )
        for field in dataclasses.fields(ModelAccess)
    ]

    @wraps(command)
    def told(**options: Any) -> None:
        access = ModelAccess(**{field.name: options.pop(field.name) for field in fields})
        command(**options, access=access)

    # Typer reads annotations by `get_type_hints`, which wants them as objects; here they are texts.
    own = inspect.signature(command, eval_str=True).parameters
    kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own.values() if one.name != "access"]
    told.__signature__ = inspect.Signature([*kept, *fields])  # type: ignore[attr-defined]
    told.__annotations__ = {one.name: one.annotation for one in (*kept, *fields)}
    return told


def _check_models(model: str, judge: str | None = None, *, prompt_of: Path | None = None) -> None:
    """ValueError where a folder cannot be served, or that of a prompt says nothing that can be read; URLs are not
    looked at. Before what asks them is imported: it takes seconds."""
    from megatron_r1reward.hub_name import local_folder
    from megatron_r1reward.model_folder.config_reader import CONFIG, parse_config
    from megatron_r1reward.model_folder.examine import check_served

    for folder, scalar in ((model, True), (judge, False)):
        if folder is not None and "://" not in folder:
            check_served(local_folder(folder), scalar=scalar)
    if prompt_of is not None:
        parse_config(local_folder(prompt_of) / CONFIG)
        read_policy(local_folder(prompt_of))


def serve_labels(run_file: RunFile, overrides: Overrides = None) -> None:
    """The released remote-reward protocol (POST /get_reward_mllm) for the original training code."""
    with user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.data.rows import check_source

        config = load_config(run_file, overrides or [])
        check_source(config.data.train)
        from megatron_r1reward.launch.stage_models import check_models

        check_models(config, "judge")
        from megatron_r1reward.launch.serve_model import serve_labels as run_service

        run_service(config)


def serve(
    model: Annotated[
        str, typer.Argument(help="folder or ORG/NAME@REVISION, served here; or URLs of servers, with commas")
    ],
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the page and the API")] = 8080,
    servers: Annotated[int, typer.Option(help="vLLM servers to start for a model folder")] = 1,
    concurrency: Annotated[int, typer.Option(help="requests in progress; more hear 429")] = 64,
    image_root: Annotated[list[Path] | None, typer.Option(help="folder that image paths may be in; repeatable")] = None,
    token_variable: Annotated[str, typer.Option(help="variable with the clients' token")] = "R1REWARD_SERVE_TOKEN",
    allow_anonymous: Annotated[bool, typer.Option(help="a network address without a token")] = False,
    max_tokens: Annotated[int, typer.Option(help="of one judgement")] = 1024,
    max_model_len: Annotated[int, typer.Option(help="of started servers: prompt, images and judgement")] = 16384,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of one started server")] = 1,
    cohort_size: Annotated[int, typer.Option(help="samples per prompt of trainers that send one at a time")] = 8,
    cohort_deadline: Annotated[float, typer.Option(help="seconds that the first of them waits for the others")] = 30.0,
    on_failure: Annotated[
        str, typer.Option(help="samples without a reward: neutral (0.5, counted) or raise")
    ] = "raise",
    prompt_of: PromptOf = None,
    trust_parser: TrustParser = False,
) -> None:
    """A trained model behind HTTP: compare, rank, score, and a page to try it; OpenAPI at /openapi.json."""
    with user_errors():
        if model.endswith(".toml"):
            raise ValueError(f"{model} is a run file: rewards for known labels are `r1reward serve-labels {model}`")
        _check_models(model, prompt_of=prompt_of)
        from megatron_r1reward.config.schema import ServerSection
        from megatron_r1reward.launch.serve_model import cpu_defaults, serve_model

        section = ServerSection(
            max_model_len=max_model_len, tensor_parallel_size=tensor_parallel_size, **cpu_defaults()
        )
        serve_model(
            model,
            host=host,
            port=port,
            servers=servers,
            concurrency=concurrency,
            image_roots=image_root or [],
            token_variable=token_variable,
            allow_anonymous=allow_anonymous,
            max_tokens=max_tokens,
            section=section,
            cohort_size=cohort_size,
            cohort_deadline_s=cohort_deadline,
            on_failure=on_failure,  # type: ignore[arg-type]  # checked there
            prompt_of=prompt_of,
            trust_parser=trust_parser,
        )


@_asks_a_model
def score(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="rows {question, responses, images}")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="grows row by row; an earlier run is continued")],
    access: ModelAccess,
    best_of: Annotated[Path | None, typer.Option(help="also write the winner of each row to this JSONL file")] = None,
    image_root: Annotated[Path | None, typer.Option(help="of relative image paths; default: IN's folder")] = None,
    votes: Annotated[int, typer.Option(help="judgements per pair and order; 1 is greedy")] = 1,
    one_order: Annotated[bool, typer.Option(help="ask in the given order only: half the calls, with its bias")] = False,
    schedule: Annotated[str, typer.Option(help="swiss, all_pairs, knockout, circular or pivot")] = "swiss",
    rounds: Annotated[int | None, typer.Option(help="of swiss; default: log2 of the candidates")] = None,
    budget: Annotated[int | None, typer.Option(help="judgements per row at most")] = None,
    seed: int = 0,
) -> None:
    """Rewards, ranking and best-of-N for files of responses, by a trained model."""
    with user_errors():
        check_file(source)
        access.check()
        _check_models(access.model, prompt_of=access.prompt_of)
        from megatron_r1reward.judging.score_files import run_score

        run_score(
            source,
            output,
            access,
            best_of=best_of,
            image_root=image_root,
            votes=votes,
            both_orders=not one_order,
            schedule=schedule,
            rounds=rounds,
            budget=budget,
            seed=seed,
        )


@_asks_a_model
def bench(
    benchmark: Annotated[
        str, typer.Argument(help="vl-rewardbench, multimodal-rewardbench or mm-rlhf-rewardbench; pairs: FILE alone")
    ],
    access: ModelAccess,
    out: Annotated[Path, typer.Option(help="folder of the judgements and the numbers; an earlier run is continued")],
    source: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="the published file, beside images")] = None,
    image_root: Annotated[Path | None, typer.Option(help="of relative image paths; default: FILE's folder")] = None,
    legacy: Annotated[bool, typer.Option(help="also the grouping of the released scripts (vl-rewardbench)")] = False,
    samples: Annotated[int, typer.Option(help="per pair and order, beside the greedy judgement: voting@k")] = 0,
    temperature: Annotated[float, typer.Option(help="of the samples")] = 1.0,
    prompt: Annotated[
        Path | None, typer.Option(help="another model's prompt, with {question}, {response_1}, {response_2}")
    ] = None,
    verdict: Annotated[
        str,
        typer.Option(help="answer, released, answer-text, brackets, boxed, a pattern with a group (docs/use.md)"),
    ] = "answer",
    request: Annotated[str, typer.Option(help="JSON fields of each request; null leaves one out")] = "{}",
    judge: Annotated[
        str | None, typer.Option(help="folder or URLs of a consistency judge of the samples: judge-filtered votes")
    ] = None,
    judge_name: Annotated[
        str | None, typer.Option(help="at the judge's URLs; default: the first that they list")
    ] = None,
    judge_key_variable: Annotated[str, typer.Option(help="variable that holds the key of the judge's URLs")] = (
        "OPENAI_API_KEY"
    ),
    seed: int = 0,
) -> None:
    """A public benchmark by its own rule and in both orders."""
    with user_errors():
        from megatron_r1reward.data.rows import check_source
        from megatron_r1reward.evaluation.benchmark_rules import named_source

        name, file = named_source(benchmark, source)
        check_source(file)
        access.check()
        _check_models(access.model, judge, prompt_of=access.prompt_of)
        from megatron_r1reward.evaluation.bench import BenchOptions, run_bench
        from megatron_r1reward.evaluation.judged_votes import JudgeAccess
        from megatron_r1reward.report.bench_report import write_bench_report

        asked = None
        if judge is not None:
            asked = JudgeAccess(judge=judge, judge_name=judge_name, api_key_variable=judge_key_variable)
        options = BenchOptions(
            image_root=image_root,
            legacy=legacy,
            samples=samples,
            temperature=temperature,
            prompt=prompt,
            verdict=verdict,
            request=request,
            judge=asked,
            seed=seed,
        )
        result = run_bench(name, file, out, access, options)
        typer.echo(write_bench_report(result, out))
        result.check_complete()


def calibrate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="that `sft` or `rl` exported: <output_dir>/hf")],
    evaluation: Annotated[Path, typer.Argument(metavar="evaluation.json", help="of `eval`, on these weights")],
) -> None:
    """Let a folder carry the calibration that an evaluation has fitted: `compare` then gives it, too."""
    with user_errors():
        check_file(evaluation)
        own_policy(folder)
        from megatron_r1reward.evaluation.calibration import calibrate_folder

        for one in calibrate_folder(folder, evaluation):
            typer.echo(
                f"{one.aggregator}, votes {one.votes}: temperature {one.temperature:.3f}; calibration error "
                f"{one.error_before:.3f} before, {one.error_after:.3f} after"
            )
