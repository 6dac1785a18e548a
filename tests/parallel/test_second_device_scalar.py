"""A scalar reward model on the second device: what a GPU would refuse fails here, and the numbers are a CPU's."""

from __future__ import annotations

import numpy as np
import parallel_parity as parity
import pytest
from forked_ranks import run_ranks
from parity_layouts import LAYOUTS, SINGLE
from test_scalar_layouts import two_steps
from test_second_device import ALLOWED_WAITS

pytestmark = pytest.mark.parallel
OURS = {
    "training/rm.py::bradley_terry": "what a step reports, once per micro-batch",
    "training/rm.py::collect": "rewards leave the device, once per micro-batch",
}


def _on_the_device(*arguments: object) -> tuple[parity.Trace, set[str]]:
    import second_device

    second_device.install()
    with second_device.Rules():
        trace = two_steps(*arguments)  # type: ignore[arg-type]
    return trace, set(second_device.waits)


def test_it_trains_on_a_device_with_the_numbers_of_a_cpu(families, parity_images) -> None:
    folder = families["qwen2_5_vl"]
    reference = run_ranks(two_steps, 1, folder, parity_images, SINGLE, 2, 100_000)[0]
    found = run_ranks(_on_the_device, 2, folder, parity_images, LAYOUTS["TP2+SP"], 2, parity.BUDGET, False)
    got = found[0][0]
    assert np.array(got.records) == pytest.approx(np.array(reference.records), rel=1e-4)  # loss, gradient norm
    for number, reward in reference.log_probs.items():
        assert got.log_probs[number] == pytest.approx(reward, abs=1e-5)
    waits = set.union(*(waits for _, waits in found))
    assert not {place for place in waits if not place.startswith((*ALLOWED_WAITS, *OURS))}
