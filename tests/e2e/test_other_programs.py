"""Other programs' own code against the service: TRL's trainer takes a step, verl's loader loads our reward function."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import Running

from megatron_r1reward.serving import clients

pytestmark = pytest.mark.e2e


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it (verl's own import wants Ray)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed: `make peers`")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def service() -> Iterator[Running]:
    running = Running(cohort_size=3)
    running.judge.strengths = defaultdict(float, {"bad": -9.0, "good": 9.0})
    yield running
    running.stop()


def test_trl_takes_a_grpo_step(service: Running, tiny_folder: Path, tmp_path: Path) -> None:
    package_folder("trl")
    script = Path(__file__).with_name("trl_step.py")
    command = [sys.executable, str(script), str(tiny_folder), service.url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"reward": pytest.approx(0.5), "groups": 1, "failed": 0}
    assert service.judge.calls == 2  # one pair of completions, both orders


def test_verls_loader_loads_our_reward_function(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    source = package_folder("verl") / "utils" / "import_utils.py"
    spec = importlib.util.spec_from_file_location("verl_import_utils", source)
    assert spec is not None
    assert spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    compute_score = loader.load_extern_object(module_path=clients.__file__, object_name="compute_score")
    monkeypatch.setenv("R1REWARD_URL", service.url)

    async def batch() -> list[float]:
        asked = {"data_source": "mine", "ground_truth": "", "extra_info": {"question": "Which?"}}
        return await asyncio.gather(*(compute_score(solution_str=text, **asked) for text in ("bad", "good", "fair")))

    rewards = asyncio.run(batch())
    assert rewards[1] > rewards[2] > rewards[0]
