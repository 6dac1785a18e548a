"""The commands that use a trained model: `r1reward score`, `bench`, `serve`, `serve-labels`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_r1reward.user_errors import user_errors

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="applied left to right")]


def serve_labels(run_file: RunFile, overrides: Overrides = None) -> None:
    """The released remote-reward protocol (POST /get_reward_mllm) for the original training code."""
    with user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.serve_labels import serve as run_service

        run_service(load_config(run_file, overrides or []))


def serve(
    model: Annotated[str, typer.Argument(help="model folder (served here), or URLs of vLLM servers, comma-separated")],
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
) -> None:
    """A trained model behind HTTP: compare, rank, score, and a page to try it; OpenAPI at /openapi.json."""
    with user_errors():
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
        )


def score(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="rows {question, responses, images}")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="grows row by row; an earlier run is continued")],
    model: Annotated[str, typer.Option(help="model folder (served here), or URLs of servers, comma-separated")],
    best_of: Annotated[Path | None, typer.Option(help="also write the winner of each row to this JSONL file")] = None,
    image_root: Annotated[Path | None, typer.Option(help="of relative image paths; default: IN's folder")] = None,
    votes: Annotated[int, typer.Option(help="judgements per pair and order; 1 is greedy")] = 1,
    one_order: Annotated[bool, typer.Option(help="ask in the given order only: half the calls, with its bias")] = False,
    schedule: Annotated[str, typer.Option(help="swiss, all_pairs, knockout, circular or pivot")] = "swiss",
    rounds: Annotated[int | None, typer.Option(help="of swiss; default: log2 of the candidates")] = None,
    budget: Annotated[int | None, typer.Option(help="judgements per row at most")] = None,
    servers: Annotated[int, typer.Option(help="vLLM servers to start for a model folder")] = 1,
    max_tokens: Annotated[int, typer.Option(help="of one judgement")] = 1024,
    max_model_len: Annotated[int, typer.Option(help="of started servers: prompt, images and judgement")] = 16384,
    api_key_variable: Annotated[str, typer.Option(help="variable that holds the URL's key")] = "OPENAI_API_KEY",
    seed: int = 0,
) -> None:
    """Rewards, ranking and best-of-N for files of responses, by a trained model."""
    with user_errors():
        from megatron_r1reward.judging.score_files import run_score

        run_score(
            source,
            output,
            model,
            best_of=best_of,
            image_root=image_root,
            votes=votes,
            both_orders=not one_order,
            schedule=schedule,
            rounds=rounds,
            budget=budget,
            servers=servers,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            api_key_variable=api_key_variable,
            seed=seed,
        )


def bench(
    benchmark: Annotated[
        str, typer.Argument(help="vl-rewardbench, multimodal-rewardbench, mm-rlhf-rewardbench, or pairs: any other set")
    ],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="the published file, with its images beside it")],
    model: Annotated[str, typer.Option(help="model folder (served here), or URLs of servers, comma-separated")],
    out: Annotated[Path, typer.Option(help="folder of the judgements and the numbers; an earlier run is continued")],
    image_root: Annotated[Path | None, typer.Option(help="of relative image paths; default: FILE's folder")] = None,
    legacy: Annotated[bool, typer.Option(help="also the grouping of the released scripts (vl-rewardbench)")] = False,
    servers: Annotated[int, typer.Option(help="vLLM servers to start for a model folder")] = 1,
    max_tokens: Annotated[int, typer.Option(help="of one judgement")] = 1024,
    max_model_len: Annotated[int, typer.Option(help="of started servers: prompt, images and judgement")] = 16384,
    api_key_variable: Annotated[str, typer.Option(help="variable that holds the URL's key")] = "OPENAI_API_KEY",
    seed: int = 0,
) -> None:
    """A public benchmark by its own rule and in both orders."""
    with user_errors():
        from megatron_r1reward.evaluation.bench import run_bench

        run_bench(
            benchmark,
            source,
            out,
            model,
            image_root=image_root,
            legacy=legacy,
            servers=servers,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            api_key_variable=api_key_variable,
            seed=seed,
        )
