"""What the subcommands with servers do: open what the stage needs, run it, close everything."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.difficulty import read_records, select_hard, summary
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.loader import seeded_sample
from megatron_r1reward.data.prompt import TEMPLATE, PromptBuilder
from megatron_r1reward.data.selection import in_categories, selection
from megatron_r1reward.data.stage_data import kind_of, read_heldout, read_training_preferences, template_of
from megatron_r1reward.evaluation.cold_start_set import (
    WITHOUT_VERDICT,
    ColdStartSet,
    ReasoningFilter,
    build_cold_start,
    card,
)
from megatron_r1reward.evaluation.control_sets import make_pair_kinds
from megatron_r1reward.evaluation.evaluate import evaluate as evaluate_pairs
from megatron_r1reward.evaluation.judged_votes import VoteJudge
from megatron_r1reward.evaluation.result import EvaluationResult, ScalarEvaluation
from megatron_r1reward.evaluation.scalar_evaluation import evaluate_scalar, sampled_rating_accuracy
from megatron_r1reward.evaluation.vote_budget import NO_JUDGE
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.judging.served import policy_of
from megatron_r1reward.launch.addresses import connected
from megatron_r1reward.launch.stage_models import check_models
from megatron_r1reward.launch.stage_servers import (
    open_annotator,
    open_evaluation_alone,
    open_evaluation_judge,
    open_evaluation_pool,
    open_judge,
    open_rl_services,
)
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.model_folder.scalar_folder import is_scalar_folder
from megatron_r1reward.processes import quick_imports
from megatron_r1reward.reward.readers import parser_of, reader_of
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.types import Label, Preference

log = logging.getLogger(__name__)


def rl(config: RunConfig, *, rendezvous: Path | None = None, supervised: bool = False) -> bool:
    """Stage 2, on every rank; the main rank also has the servers and the reward. False: saved and stopped on request.

    With `supervised` the servers are those whose addresses the run directory holds. A replay has none.
    """
    config.sampling.check_for_rl()
    check_models(config, "rl")
    with quick_imports():  # megatron-core, which the other stages do without
        from megatron_r1reward.launch.trainer_ranks import ranks
        from megatron_r1reward.training import rl as rl_stage

    with ranks(config, rendezvous) as topology, ExitStack() as stack:
        services = None
        if topology.is_main and config.rl.replay is None:
            ours = connected(config, "rl") if supervised else config
            opened = stack.enter_context(open_rl_services(ours, supervised=supervised))
            services = rl_stage.Services(
                pool=opened.pool,
                scorer=RewardScorer(
                    config.reward, opened.judge, read=reader_of(config), pointwise=config.rl.pairing == "pointwise"
                ),
                probe=_heldout_probe(config, opened.pool),
            )
        topology.from_main(None)  # colocated: no rank takes memory before the servers sleep
        folder = rl_stage.run(config, topology, services)
    if folder is not None:
        log.info("RL finished: %s", folder)
    return folder is not None


def _heldout_probe(config: RunConfig, pool: RolloutPool) -> Callable[[], float] | None:
    if config.rl.heldout_every is None:
        return None
    pairs = seeded_sample(_heldout(config), config.rl.heldout_pairs, seed=config.run.seed)

    def probe() -> float:
        return _evaluate(config, pool, pairs, samples=1, voting=(1,), transcripts=0).accuracy

    def probe_ratings() -> float:
        limit, template = config.data.max_prompt_tokens, template_of(config)
        builder = PromptBuilder(load_tokenizer(config.model.path), limit, template=template)
        return sampled_rating_accuracy(pairs, pool, builder, config.sampling, seed=config.run.seed)

    return probe if kind_of(config) == "generative" else probe_ratings


def annotate(config: RunConfig, *, supervised: bool = False) -> None:
    """Difficulty of every training preference, and the hard set that RL trains on."""
    from megatron_r1reward.evaluation.annotate import Budget  # openai loads for seconds
    from megatron_r1reward.evaluation.annotate import annotate as annotate_preferences

    check_models(config, "annotate")
    _check_as_published(config)
    output = config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    section = config.annotate
    preferences = seeded_sample(_to_annotate(config), section.max_rows, seed=config.run.seed)
    with (
        open_annotator(config, supervised=supervised) as (url, api_key),
        tqdm(total=len(preferences), desc="annotate", unit="sample") as progress,
    ):
        records = annotate_preferences(
            preferences,
            base_url=url,
            model=section.model,
            api_key=api_key,
            attempts=section.attempts,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            concurrency=section.concurrency,
            output=output / "attempts.jsonl",
            seed=config.run.seed,
            served=_served_here(config),
            budget=Budget(
                tokens=section.budget_tokens,
                cost=section.budget_cost,
                prompt_price=section.prompt_price,
                completion_price=section.completion_price,
                requests_per_minute=section.requests_per_minute,
            ),
            progress=progress.update,
            known_already=partial(_begin_at, progress),
        )
    hard = selection(preferences, set(select_hard(records)))
    counts = summary(records)
    write_text(output / "hard.json", json.dumps(hard) + "\n")
    write_text(output / "difficulty.json", json.dumps(counts) + "\n")
    log.info("attempts needed: %s; hard set: %d of %d", counts, len(hard), len(records))


def _begin_at(progress: tqdm[NoReturn], done: int) -> None:
    """What earlier calls did took none of this one's time, and says nothing about the time that remains."""
    progress.initial = progress.n = progress.last_print_n = done
    progress.refresh()


def _to_annotate(config: RunConfig) -> list[Preference]:
    """The rows of `data.categories`. The other keys that select rows rest on what `annotate` finds out."""
    preferences, section = read_training_preferences(config, "annotate").preferences, config.data
    later = [name for name in section.criteria if name != "categories"] + ["curriculum"] * bool(section.curriculum)
    if later:
        log.info("all rows are annotated, and data.%s chooses among them afterwards", ", data.".join(later))
    return in_categories(preferences, preferences, section.categories, "data.")


def _check_as_published(config: RunConfig) -> None:
    """Raises ValueError where a model that is served here would be asked or read otherwise than it was trained."""
    if config.annotate.url is not None:
        return
    for part, own in (("prompt", template_of(config) != TEMPLATE), ("parser", parser_of(config) is not None)):
        if own:
            raise ValueError(
                f"model.path {config.model.path} or [prompt] has a {part} of its own, and annotate asks and reads as "
                "published: serve the model elsewhere and name its annotate.url"
            )


def write_cold_start(config: RunConfig, out: Path, *, keep: ReasoningFilter, judged: bool = False) -> ColdStartSet:
    """Write `sft.jsonl`, `README.md` and `sft.json` into `out`, from the run file that `annotate` ran with.

    Args:
        judged: ask the judge of [judge] whether each reasoning supports its answer.

    Raises:
        ValueError: `annotate` has not run, or no reasoning is left.
    """
    attempts = config.run.output_dir / "attempts.jsonl"
    if not attempts.is_file():
        raise ValueError(f"{attempts} does not exist: run `r1reward annotate` with the same run file first")
    preferences = _to_annotate(config)
    records = read_records(attempts)
    if judged:
        everything = config.judge.model_copy(update={"max_calls_per_step": None})  # this is no step
        with open_judge(config.model_copy(update={"judge": everything})) as judge:
            if judge is None:
                raise ValueError("reward.use_judge is false: set it to true, or leave out --judge")

            def ask(cases: Sequence[tuple[str, Label]]) -> Sequence[str]:
                return asyncio.run(judge.judge_many(cases))

            built = build_cold_start(preferences, records, keep=keep, judge=ask)
    else:
        built = build_cold_start(preferences, records, keep=keep)
    if unknown := built.counts.get(WITHOUT_VERDICT):
        log.warning(
            "the judge gave no verdict on %d reasonings, which are left out: run again to ask about them", unknown
        )
    built = replace(built, settings={"attempts": str(attempts), "judge": judged, **asdict(keep)})
    if not built.rows:
        raise ValueError(f"{attempts}: no reasoning is left: {dict(built.counts)}")
    write_jsonl(out / "sft.jsonl", built.rows)
    summary = {name: value for name, value in asdict(built).items() if name != "rows"}
    write_text(out / "sft.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "README.md", card(built))
    log.info("%s: %d rows; %s", out / "sft.jsonl", len(built.rows), dict(built.counts))
    return built


def _served_here(config: RunConfig) -> dict[str, object]:
    """What the name of a model of ours does not say; of a remote one nothing more is known."""
    if config.annotate.url is not None:
        return {}
    return {
        "weights": model_identity(config.model.path),
        "dtype": config.rollout.dtype,
        "min_pixels": config.data.min_pixels,
        "max_pixels": config.data.max_pixels,
    }


def evaluate(config: RunConfig, *, supervised: bool = False) -> None:
    """Held-out accuracy of `model.path`, and with shuffled images where the run file asks for that control.

    With `supervised` the servers are components of this life.
    """
    check_models(config, "eval")
    output = config.run.output_dir
    output.mkdir(parents=True, exist_ok=True)
    section = config.evaluation
    if (alone := _asked_alone(config)) is not None:
        _write_evaluation(config, _evaluate_alone(config, alone, supervised=supervised))
        return
    pairs = _heldout(config)
    with (
        open_evaluation_judge(config, supervised=supervised) as judge,
        open_evaluation_pool(config, supervised=supervised) as pool,
    ):
        result = _evaluate(
            config,
            pool,
            pairs,
            samples=section.samples,
            voting=section.voting,
            transcripts=section.transcripts,
            greedy=section.greedy,
            extra=make_pair_kinds(pairs, section.extra_pairs, config.run.seed),
            judge=judge,
        )
        if section.shuffled_images_control:
            control = _evaluate(config, pool, pairs, samples=1, voting=(1,), transcripts=0, shuffle_images=True)
            result = result.model_copy(update={"control": control})
    _write_evaluation(config, result)
    voting = {k: round(100 * v, 1) for k, v in result.voting.items()}
    log.info("voting %s, format %.1f %%", voting, 100 * result.format_rate)
    for kind in result.pair_kinds:
        log.info(
            "%d pairs, %s: the first place wins %s, the orders agree %s",
            *(kind.pairs, kind.kind),
            *("-" if share is None else f"{share:.1%}" for share in (kind.first_place, kind.order_agreement)),
        )


def _write_evaluation(config: RunConfig, result: EvaluationResult | ScalarEvaluation) -> None:
    """`evaluation.json`, with what was measured on what."""
    data = config.evaluation.data
    measured = {"data": Path(data).name if data is not None else None}
    if not config.rollout.urls and config.rollout.model_path is None:
        measured["weights"] = model_identity(config.model.path)
    result = result.model_copy(update=measured)
    write_text(config.run.output_dir / "evaluation.json", result.to_json())
    shares = (100 * share for share in (result.accuracy, *result.interval))
    log.info("%d pairs: accuracy %.1f %% [%.1f, %.1f]", result.counts.pairs, *shares)


def _asked_alone(config: RunConfig) -> PromptPolicy | None:
    """How a model is asked that reads one response at a time; None: it compares."""
    if is_scalar_folder(config.model.path):
        return policy_of(config.model.path)
    if kind_of(config) == "pointwise":
        return PromptPolicy(kind="pointwise", template=template_of(config), orders="any")
    return None


def _evaluate_alone(config: RunConfig, policy: PromptPolicy, *, supervised: bool) -> ScalarEvaluation:
    """Of a scalar or pointwise reward model; the keys about samples mean nothing to it, and `absent` says why."""
    pairs, section = _heldout(config, scalar=policy.kind == "scalar"), config.evaluation
    controls = (False, True) if section.shuffled_images_control else (False,)
    with (
        open_evaluation_alone(config, policy, supervised=supervised) as served,
        tqdm(total=len(pairs) * len(controls), desc="evaluate", unit="pair", dynamic_ncols=True) as progress,
    ):
        result, *control = (
            evaluate_scalar(
                served,
                served.group.loop.run,
                pairs,
                seed=config.run.seed,
                shuffle_images=shuffled,
                progress=progress.update,
            )
            for shuffled in controls
        )
    return result.model_copy(update={"control": control[0] if control else None})


def _heldout(config: RunConfig, *, scalar: bool = False) -> tuple[Preference, ...]:
    found = read_heldout(config, scalar=scalar)
    return seeded_sample(found.preferences, config.evaluation.max_pairs, seed=config.run.seed)


def _evaluate(
    config: RunConfig,
    pool: RolloutPool,
    pairs: tuple[Preference, ...],
    *,
    samples: int,
    voting: tuple[int, ...],
    transcripts: int,
    shuffle_images: bool = False,
    greedy: bool = False,
    extra: Mapping[str, Sequence[Preference]] | None = None,
    judge: VoteJudge | str = NO_JUDGE,
) -> EvaluationResult:
    tokenizer, read = load_tokenizer(config.model.path), reader_of(config)
    title = "control: shuffled images" if shuffle_images else "evaluate"
    prompts = 2 * (len(pairs) * (1 + greedy) + sum(map(len, (extra or {}).values())))
    with tqdm(total=prompts, desc=title, unit="prompt", dynamic_ncols=True) as progress:
        return evaluate_pairs(
            pairs,
            pool,
            PromptBuilder(tokenizer, config.data.max_prompt_tokens, template=template_of(config)),
            config.sampling,
            samples=samples,
            voting=voting,
            seed=config.run.seed,
            shuffle_images=shuffle_images,
            greedy=greedy,
            extra=extra,
            transcripts=transcripts,
            read=read,
            # Which token holds the verdict is known of the published form only.
            token_text=cache(lambda token: tokenizer.decode([token])) if read is None else None,
            judge=judge,
            progress=lambda done, total: progress.update(1),
        )
