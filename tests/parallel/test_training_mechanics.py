"""What several ranks have to do together: skip a bad step, stay alive without images, encode an image once, freeze
parts, and write checkpoints that any layout reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from parity_layouts import CP2, OVERLAP, PP2, SHARDED, TP2, VPP2, Layout

from megatron_r1reward.checkpoint.dist import Trained, load_checkpoint
from megatron_r1reward.checkpoint.saver import CheckpointSaver
from megatron_r1reward.config.schema import CheckpointSection, ParallelSection
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.schedule import LossOutput, reduce_statistics, train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch

pytestmark = pytest.mark.parallel
PLAIN_SINGLE = Layout(ranks=1, parallel={})


def weights_of(state: TrainState) -> dict[str, np.ndarray]:
    return {n: w.numpy().copy() for n, w in state.exporter.tensors()}


def train(state: TrainState, sequences: list, indices: list[int], loss=cross_entropy) -> tuple[dict, bool, float]:
    mine = indices[state.topology.data_parallel_rank :: state.topology.data_parallel_size]
    statistics, outcome = train_micro_batches(state, sequences, state.packer.plan(sequences, mine), loss)
    return reduce_statistics(state, statistics), outcome.skipped, outcome.grad_norm


def _one_bad_step(folder: Path, images: tuple[str, ...], parallel: dict, bad_rank: int) -> dict[str, object]:
    """A loss that is infinite on one rank in the first of two steps; weights before, between and after."""
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel), parity.BUDGET)

    def infinite(output: torch.Tensor, batch: PackedBatch) -> LossOutput:
        total, count, statistics = cross_entropy(output, batch)
        return (total * float("inf") if state.topology.rank == bad_rank else total), count, statistics

    before = weights_of(state)
    _, skipped, norm = train(state, sequences, list(range(8)), infinite)
    between = weights_of(state)
    total, skipped_next, _ = train(state, sequences, list(range(8)))
    after = weights_of(state)
    return {
        "skipped": (skipped, skipped_next),
        "norm": norm,
        "kept": all(np.array_equal(before[n], between[n]) for n in before),
        "moved": any(not np.array_equal(between[n], after[n]) for n in after),
        "loss": total["loss"] / total["tokens"],
        "in a row": state.skipped_in_a_row,
    }


@pytest.mark.parametrize(
    ("parallel", "bad_rank"),
    [({}, 1), (PP2, 1), (CP2, 0), (OVERLAP, 0)],
    ids=["DP2", "PP2", "CP2", "DP2_overlap"],
)
def test_all_ranks_skip_a_bad_step_together_and_go_on(parallel, bad_rank, folder, parity_images, parity_references):
    results = run_ranks(_one_bad_step, 2, folder, parity_images, parallel, bad_rank)
    for result in results:
        assert result["skipped"] == (True, False)
        assert not np.isfinite(result["norm"])
        assert result["in a row"] == 0
    # The main rank has gathered the weights of all.
    assert results[0]["kept"], "a skipped step changes no weight"
    assert results[0]["moved"]
    expected = parity_references["qwen2_5_vl"].records[0][0]
    assert results[0]["loss"] == pytest.approx(expected, abs=1e-5), "moments and weights are as before the bad step"


def _never_finite(folder: Path, images: tuple[str, ...]) -> str:
    state, sequences = parity.build(folder, images, PLAIN_SINGLE, parity.BUDGET)
    section = state.config.optimizer.model_copy(update={"max_skipped_steps": 2})
    state.config = state.config.model_copy(update={"optimizer": section})

    def nan(output: torch.Tensor, batch: PackedBatch) -> LossOutput:
        total, count, statistics = cross_entropy(output, batch)
        return total * float("nan"), count, statistics

    train(state, sequences, [0, 1], nan)
    try:
        train(state, sequences, [0, 1], nan)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_a_run_that_cannot_recover_fails_with_advice(folder, parity_images) -> None:
    (message,) = run_ranks(_never_finite, 1, folder, parity_images)
    assert "2 optimizer steps in a row had a gradient norm of nan" in message


def _losses_of(folder: Path, images: tuple[str, ...], parallel: dict, batches: list[list[int]]) -> list[float]:
    """Loss of one step per batch of sequence numbers. Sequences 0, 3, 4 and 6 are text only."""
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel), parity.BUDGET)
    losses = []
    for batch in batches:
        total, _, _ = train(state, sequences, batch)
        losses.append(total["loss"] / total["tokens"])
    return losses


TEXT_ONLY = {
    "PP2": PP2,
    "TP2_sharded": TP2 | SHARDED,
    "CP2_sharded_overlap": CP2 | SHARDED | OVERLAP,
    "DP2_overlap": OVERLAP,
    "PP2_VPP2": VPP2,
}


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_text_only_batches_hang_nothing_and_train_the_same(name, folder, parity_images) -> None:
    """Steps without any image, with images on one data-parallel rank only, and with images again."""
    batches = [[0, 4], [0, 1, 3, 5], [5, 4, 1, 6], [3, 6]]
    (expected,) = run_ranks(_losses_of, 1, folder, parity_images, {}, batches)
    got = run_ranks(_losses_of, 2, folder, parity_images, TEXT_ONLY[name], batches)[0]
    assert got == pytest.approx(expected, abs=2e-5)


def test_overlap_waits_for_no_deepstack_merger_without_images(families, parity_images) -> None:
    """The blank image of a text-only micro-batch reaches every parameter of the other family's tower, too."""
    batches = [[0, 4], [5, 4, 1, 6], [3, 6]]
    (expected,) = run_ranks(_losses_of, 1, families["qwen3_vl"], parity_images, {}, batches)
    got = run_ranks(_losses_of, 2, families["qwen3_vl"], parity_images, OVERLAP, batches)[0]
    assert got == pytest.approx(expected, abs=2e-5)


def _encoded_patches(folder: Path, images: tuple[str, ...], parallel: dict) -> tuple[int, int]:
    """(patches this rank's tower saw, patches of all placeholders) for one micro-batch of all sequences."""
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel), 100_000)
    seen = []
    tower = state.module.vision
    tower.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    train(state, sequences, list(range(8)))
    grids = [state.packer.image_processor(path).grid for s in sequences for path in s.image_paths]
    return sum(seen), sum(int(np.prod(grid)) for grid in grids)


def test_a_shared_image_is_encoded_once_and_ranks_share_the_images(folder, parity_images) -> None:
    (whole,) = run_ranks(_encoded_patches, 1, folder, parity_images, {})
    assert whole[0] < whole[1] / 2, "three images stand seven times in the batch"
    for parallel in (TP2 | SHARDED, CP2 | SHARDED):
        shares = run_ranks(_encoded_patches, 2, folder, parity_images, parallel)
        assert sum(seen for seen, _ in shares) == whole[0]
        assert all(seen < whole[0] for seen, _ in shares)


def _moved_parts(folder: Path, images: tuple[str, ...], parallel: dict, model: dict) -> set[str]:
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel, model=model), parity.BUDGET)
    before = weights_of(state)
    train(state, sequences, list(range(8)))
    after = weights_of(state)

    def part(name: str) -> str:
        return "language" if "visual" not in name else "merger" if "merger" in name else "tower"

    return {part(name) for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("model", "parallel", "moved"),
    [
        ({"freeze_vision": True}, OVERLAP, {"language"}),
        ({"freeze_vision_tower": True}, TP2 | SHARDED, {"language", "merger"}),
        ({"freeze_merger": True}, PP2, {"language", "tower"}),
        ({"freeze_language": True}, {}, {"merger", "tower"}),
        ({"freeze_language": True, "freeze_vision_tower": True}, CP2 | SHARDED, {"merger"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_freeze_switches(model, parallel, moved, folder, parity_images) -> None:
    assert run_ranks(_moved_parts, 2, folder, parity_images, parallel, model)[0] == moved


def test_freezing_the_language_model_of_a_pipeline_is_refused(folder, parity_images) -> None:
    with pytest.raises(AssertionError, match="set pipeline_model_parallel_size to 1"):
        run_ranks(_moved_parts, 2, folder, parity_images, PP2, {"freeze_language": True})


def _trained(state: TrainState) -> Trained:
    return Trained(model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)


def _save(folder: Path, images: tuple[str, ...], parallel: dict, out: Path) -> dict[str, np.ndarray]:
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel), parity.BUDGET)
    train(state, sequences, list(range(8)))
    saver = CheckpointSaver(out, CheckpointSection(keep_last=1))
    saver.save(1, _trained(state), {})
    saver.close()
    return weights_of(state)


def _load(folder: Path, images: tuple[str, ...], parallel: dict, out: Path) -> tuple[dict[str, np.ndarray], float]:
    state, sequences = parity.build(folder, images, Layout(ranks=0, parallel=parallel), parity.BUDGET)
    load_checkpoint(out / "step-00000001", _trained(state))
    weights = weights_of(state)
    total, _, _ = train(state, sequences, list(range(8)))
    return weights, total["loss"] / total["tokens"]


@pytest.mark.parametrize(
    ("saved", "loaded"), [(VPP2, {}), (TP2 | SHARDED, VPP2), (CP2 | SHARDED, TP2)], ids=["VPP2", "sharded", "CP2"]
)
def test_checkpoints_move_between_layouts(saved, loaded, folder, parity_images, parity_references, tmp_path) -> None:
    weights = run_ranks(_save, 2, folder, parity_images, saved, tmp_path)[0]
    got, loss = run_ranks(_load, 2, folder, parity_images, loaded, tmp_path)[0]
    for name, expected in weights.items():
        assert np.array_equal(got[name], expected), name
    assert loss == pytest.approx(parity_references["qwen2_5_vl"].records[1][0], abs=1e-5)


def _free_while_sending(elements: int) -> float:
    """Send, free the storage the way the pipeline schedule does, overwrite memory, then receive."""
    topology = setup.initialize(ParallelSection(pipeline_model_parallel_size=2), seed=0)
    if topology.rank == 0:
        tensor = torch.full((elements,), 3.0)
        work = dist.isend(tensor, dst=1)
        tensor.data = torch.empty(1)
        garbage = [torch.full((elements,), -1.0) for _ in range(4)]
        dist.barrier()
        work.wait()
        return float(garbage[0][0])
    dist.barrier()
    received = torch.empty(elements)
    dist.recv(received, src=0)
    return float((received - 3.0).abs().max())


def test_a_buffer_that_is_freed_while_it_is_sent_arrives_whole() -> None:
    assert run_ranks(_free_while_sending, 2, 1_000_000)[1] == 0.0
