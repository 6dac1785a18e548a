"""Every layout on the second device: what a GPU would refuse fails here, and the numbers are those of a single CPU.

Old log-probs, two policy steps, a step of SFT and the export for a push; a run that goes back to a checkpoint. Whole
stages with servers, checkpoints and resumes are in `test_second_device.py`; the families that a layout does not have
here, in `test_layouts.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
from forked_ranks import run_ranks
from made_up_record import elsewhere
from parity_layouts import LAYOUTS, SINGLE
from test_replay_layouts import check_both_went_back, run_that_collapses, went_back  # noqa: F401  (a fixture)
from test_second_device import ALLOWED_WAITS, WAITING_FOR_MAIN
from updates import ON_THE_SECOND_DEVICE, Updated, update_and_sft_step

from megatron_r1reward.config.schema import RunConfig

pytestmark = pytest.mark.parallel


def _on_the_device(*arguments: object) -> tuple[Updated, set[str], set[str]]:
    import second_device

    second_device.install()
    with second_device.Rules():
        updated = update_and_sft_step(*arguments)  # type: ignore[arg-type]
    return updated, set(second_device.waits), set(second_device.collectives)


@pytest.fixture(scope="module")
def on_one_cpu(families: dict[str, Path], parity_images: tuple[str, ...]) -> dict[str, Updated]:
    arguments = (parity_images, SINGLE, {}, 100_000)
    return {family: run_ranks(update_and_sft_step, 1, families[family], *arguments)[0] for family in families}


@pytest.mark.parametrize("name", LAYOUTS, ids=lambda name: name.replace(" ", "_"))
def test_a_layout_trains_on_a_device_with_the_numbers_of_a_cpu(name, families, parity_images, on_one_cpu) -> None:
    family, layout = ON_THE_SECOND_DEVICE[name], LAYOUTS[name]
    assert parity.applies(family, layout)
    ranks = run_ranks(_on_the_device, layout.ranks, families[family], parity_images, layout, {})
    check(on_one_cpu[family], ranks)


@pytest.mark.parametrize(("loss", "name"), [("gspo", "CP2"), ("cispo", "TP2"), ("sapo", "DP2")])
def test_every_other_loss_trains_on_a_device_with_the_numbers_of_a_cpu(loss, name, families, parity_images) -> None:
    """GSPO needs the whole sequence's ratio, also where context-parallel ranks share it."""
    family, layout, algorithm = "qwen2_5_vl", LAYOUTS[name], {"loss": loss}
    expected = run_ranks(update_and_sft_step, 1, families[family], parity_images, SINGLE, algorithm)[0]
    check(expected, run_ranks(_on_the_device, layout.ranks, families[family], parity_images, layout, algorithm))


def _go_back_on_the_device(config: RunConfig) -> None:
    import second_device

    second_device.install()
    with second_device.Rules():
        run_that_collapses(config)


def test_ranks_go_back_on_a_device_as_on_a_cpu(went_back, tmp_path) -> None:  # noqa: F811
    config = elsewhere(went_back, tmp_path)
    run_ranks(_go_back_on_the_device, 2, config)
    check_both_went_back(went_back, config)


def check(expected: Updated, ranks: list[tuple[Updated, set[str], set[str]]]) -> None:
    """The numbers of one CPU, and no rule of the device broken."""
    got = ranks[0][0]
    for key in expected.metrics.keys() - {"tokens_per_second", "lr", "update/idle_sequences"}:
        assert got.metrics[key] == pytest.approx(expected.metrics[key], rel=2e-4, abs=1e-5), key
    assert got.sft_loss == pytest.approx(expected.sft_loss, rel=1e-4)
    for key, weight in expected.weights.items():
        assert np.abs(got.weights[key] - weight).max() < 2e-5, key
    waits, collectives = (set.union(*(rank[i] for rank in ranks)) for i in (1, 2))
    assert not {place for place in waits if not place.startswith(tuple(ALLOWED_WAITS))}
    assert not collectives & WAITING_FOR_MAIN, "the device would spin until the main rank comes"
