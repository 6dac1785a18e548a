"""The checks notice broken kernels. All mutants: python tests/unit/kernels/mutants.py"""

from __future__ import annotations

import mutants
import pytest


@pytest.mark.slow
def test_the_unbroken_kernels_pass() -> None:
    assert mutants.survives(None)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in mutants.MUTANTS if m.name in mutants.QUICK], ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutant: mutants.Mutant) -> None:
    assert not mutants.survives(mutant)


def test_every_mutant_still_changes_its_source() -> None:
    for mutant in mutants.MUTANTS:
        text = (mutants.KERNELS / mutant.file).read_text()
        assert mutant.before in text, mutant.name
        assert text.replace(mutant.before, mutant.after, 1) != text, mutant.name
