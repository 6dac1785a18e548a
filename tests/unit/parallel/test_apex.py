"""NVIDIA's Apex, its absence, and the other package of that name."""

from __future__ import annotations

import importlib.util

import pytest

from megatron_r1reward.parallel.setup import check_apex, identify_apex


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_absence_costs_nothing() -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed")
    assert check_apex() == "absent"


def test_nvidias_build_is_recognised_by_its_parts(site) -> None:
    for part in ("multi_tensor_apply", "optimizers"):
        (site / "apex" / part).mkdir(parents=True)
    (site / "apex" / "__init__.py").touch()
    assert identify_apex() == "nvidia"


def test_the_unrelated_package_is_named_and_never_imported(site) -> None:
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    information = site / "apex-0.9.10.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\nSummary: A web toolkit\n"
    )
    with pytest.raises(ValueError, match=r"apex 0\.9\.10: A web toolkit.*not NVIDIA's Apex.*pip uninstall apex"):
        check_apex()
