"""The second model family end to end: a real vLLM server samples, the trainer agrees, before and after a push, and step
by step of RL.

The dense member has YaRN; the mixture of experts stacks its experts as transformers 5 saves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import rl_runs
import torch
from corpus import CORPUS
from family import Member, scale_with_yarn, transpose_experts
from reference import SERVER
from safetensors.torch import load_file

from megatron_r1reward.checkpoint.weight_exporter import WeightExporter
from megatron_r1reward.config.schema import ParallelSection, SamplingSection
from megatron_r1reward.demo.tiny_models import TINY_SPECS, write_tiny_checkpoint
from megatron_r1reward.launch import stages
from megatron_r1reward.models.registry import family_of
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.parallel import setup
from megatron_r1reward.rollout.open_pool import open_rollout_pool
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.types import Prompt, Rollout
from megatron_r1reward.weight_sync import WeightPushError

pytestmark = pytest.mark.e2e
TOLERANCE = 1e-3  # float32 on both sides, different kernels
FILE = "model.safetensors"
SAMPLING = SamplingSection(max_tokens=24)


@pytest.fixture
def topology() -> Iterator[setup.Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe"])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder = tmp_path_factory.mktemp("member") / "checkpoint"
    dense = request.param == "qwen3_vl"
    write_tiny_checkpoint(
        folder, corpus=CORPUS, spec=TINY_SPECS[request.param], tie_word_embeddings=dense, init_std=0.15
    )
    if dense:
        scale_with_yarn(folder)
    else:
        transpose_experts(folder / "model.safetensors")
    return Member(folder)


@pytest.fixture(scope="module")
def pool(member: Member, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:
    with open_rollout_pool(
        SERVER.model_copy(update={"weight_bucket_bytes": 100_000}),
        model_path=member.folder,
        tokenizer=member.tokenizer,
        log_dir=tmp_path_factory.mktemp("logs"),
        media_roots=[Path("/")],
    ) as opened:
        yield opened


def prompts(member: Member, image_paths: tuple[str, ...]) -> list[Prompt]:
    built = []
    for name, paths in (("text", ()), ("image", image_paths[1:2]), ("two images", image_paths[::2])):
        pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(paths)
        chat = f"<|im_start|>user\n{pictures}Which digit is shown?<|im_end|>\n<|im_start|>assistant\n"
        token_ids = tuple(member.tokenizer(chat)["input_ids"])
        built.append(
            Prompt(id=name, preference_id=name, token_ids=token_ids, image_paths=paths, label=1, swapped=False)
        )
    return built


@torch.no_grad()
def worst_error(model: torch.nn.Module, member: Member, rollouts: list[Rollout]) -> float:
    """Largest distance between the server's and the trainer's log-probs."""
    sequences = [member.packer.sequence(rollout.prompt, rollout.token_ids) for rollout in rollouts]
    ours = model(member.packer.pack(sequences, range(len(sequences))))[0]
    served = torch.tensor([value for rollout in rollouts for value in rollout.log_probs])
    return float((ours - served).abs().max())


def test_server_and_trainer_agree_before_and_after_a_push(
    pool: RolloutPool, member: Member, topology: setup.Topology, image_paths: tuple[str, ...]
) -> None:
    model = member.build(topology)
    before = pool.generate(prompts(member, image_paths), SAMPLING, n=2, seed=0)
    assert not before.failed
    assert len(before.rollouts) == 6
    assert worst_error(model, member, before.rollouts) < TOLERANCE

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # every tensor changes: language model, experts, tower, deepstack
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 * parameter.std() if parameter.ndim >= 2 else 0.05))
    table = family_of(member.config).weight_table(member.config)
    exporter = WeightExporter(model, table, topology)
    pool.push_weights(exporter.metas, exporter.tensors(), version=1)

    after = pool.generate(prompts(member, image_paths), SAMPLING, n=2, seed=0)
    assert {span.version for rollout in after.rollouts for span in rollout.weight_spans} == {1}
    assert worst_error(model, member, after.rollouts) < TOLERANCE
    assert worst_error(model, member, before.rollouts) > 0.1, "the push has to change something"

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    half = len(exporter.metas) // 2
    with pytest.raises(WeightPushError, match="the trainer broke off"):
        pool.push_weights(exporter.metas, _broken_off(exporter.tensors(), after=half), version=2)
    pool.push_weights(exporter.metas, exporter.tensors(), version=3)
    last = pool.generate(prompts(member, image_paths), SAMPLING, n=2, seed=0)
    assert {span.version for rollout in last.rollouts for span in rollout.weight_spans} == {3}
    assert worst_error(model, member, last.rollouts) < TOLERANCE
    assert worst_error(model, member, after.rollouts) > 0.01


def _broken_off(tensors: Iterator[tuple[str, torch.Tensor]], *, after: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from islice(tensors, after)
    raise ConnectionError("the trainer broke off")


def test_rl_trains_on_what_was_sampled(
    pool: RolloutPool, member: Member, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `r1reward rl` calls, with a server that follows the trainer from step to step."""
    (server,) = pool.group.members
    monkeypatch.setenv(TOKEN_VARIABLE, server.bearer_token or "")
    settings = rl_runs.config(
        tmp_path / "run", member.folder, data, "synchronous",
        rl={"steps": 3, "rollout_batch_size": 2, "train_batch_size": 2, "heldout_every": None},
        rollout={"urls": (server.url,), "dtype": "float32", "max_model_len": SERVER.max_model_len},
        checkpoint={"save_every": 100},
    )  # fmt: skip
    assert stages.rl(settings)
    found = rl_runs.rows(settings)
    assert list(found) == [1, 2, 3]
    assert all(row["mismatch/max_abs"] < TOLERANCE and row["grad_norm"] > 0 for row in found.values()), found
    before, after = load_file(member.folder / FILE), load_file(settings.run.output_dir / "hf" / FILE)
    trained = [name for name in before if name.endswith(("mlp.experts.down_proj", "mlp.down_proj.weight"))]
    for name in trained:
        then = before[name].transpose(1, 2) if "experts" in name else before[name]
        assert (after[name] - then).abs().max() > 1e-3, "three steps of another model would show"
    assert trained
