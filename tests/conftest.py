"""Shared fixtures, and what has to be imported before the tests are.

Nothing heavy is imported here: the tests of a light room start at once. Ranks and kernels are small: one thread each
keeps two cores from fighting.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_r1reward.processes import quick_imports

TESTS = Path(__file__).parent
# Tests that run Triton's interpreter, which must be chosen before anything imports Triton (torch does, late).
KERNEL_TESTS = ("unit/kernels", "parallel", "gpu")


# Until all tests are collected. What they import stays, and the collector never searches it again, neither here nor in
# forked ranks: a test that collects pays for its own objects only. Whoever needs SciPy or scikit-learn imports it in
# the test.
_imports = ExitStack()
_imports.enter_context(quick_imports())


# The conftests of folders that are named on the command line are read before `pytest_configure`, and import torch.
if any(folder in argument for folder in ("unit/kernels", "tests/parallel", "tests/gpu") for argument in sys.argv[1:]):
    import interpreted_triton  # noqa: F401


def _asked(config: pytest.Config, folder: Path) -> bool:
    """Whether this session collects tests of `folder`."""
    start = config.invocation_params.dir
    given = [(start / argument.partition("::")[0]).resolve() for argument in config.args]
    left_out = [(start / path).resolve() for path in config.getoption("ignore") or ()]
    if any(folder.is_relative_to(path) for path in left_out):
        return False
    return any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in given)


def _gpus_are_wanted(config: pytest.Config) -> bool:
    start, folder = config.invocation_params.dir, TESTS / "gpu"
    return any((start / argument.partition("::")[0]).resolve().is_relative_to(folder) for argument in config.args)


def pytest_configure(config: pytest.Config) -> None:
    if not _gpus_are_wanted(config):  # ranks are forked, and meet over gloo: with a CUDA build of torch, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if any(_asked(config, TESTS / folder) for folder in KERNEL_TESTS):
        import interpreted_triton  # noqa: F401


def pytest_collection_finish() -> None:
    _imports.close()


def pytest_unconfigure() -> None:
    # Libraries count their objects at the end of the interpreter; before that, pytest collects five times.
    atexit.register(gc.unfreeze)


def pytest_runtest_setup() -> None:
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2.5-VL whose distributions are far from uniform."""
    from corpus import CORPUS

    from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(folder, corpus=CORPUS, init_std=0.15)
    return folder


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Images of three shapes, with windows that are full and ragged."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate([(56, 56), (168, 84), (140, 196)]):
        path = folder / f"{index}.png"
        small = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    return tuple(paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks first: they are forked from this process, which must not have started threads by then. Servers last. The
    second device before all: autograd counts the devices when it first runs, and forked ranks inherit the count."""

    def stage(item: pytest.Item) -> int:
        order = {"parallel": 0, "e2e": 2, "slurm": 3}
        if item.path.stem.startswith("test_second_device"):
            return -1
        return next((place for marker, place in order.items() if item.get_closest_marker(marker)), 1)

    items.sort(key=stage)
