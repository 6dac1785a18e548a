"""Other programs' own code against the service: TRL's trainer takes a step, verl's loader loads our reward function,
OpenRLHF's rollout asks for rewards."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running_service import Running
from transformers import AutoTokenizer

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


class Engine:
    """In place of OpenRLHF's vLLM actor: answers the n-th prompt with the n-th text."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...]) -> None:
        self._tokenizer, self._texts = tokenizer, iter(texts)

    async def generate(self, prompt_token_ids: list[int], *_: object, **__: object) -> SimpleNamespace:
        ids = self._tokenizer(next(self._texts) + self._tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])


def test_openrlhfs_rollout_asks_for_rewards(
    service: Running, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples come one by one, in the tokens of the chat template; the three of a prompt are a cohort."""
    folder = package_folder("openrlhf")
    for name, place in (("openrlhf", folder), ("openrlhf.utils", folder / "utils")):
        package = types.ModuleType(name)  # their own import DeepSpeed
        package.__path__ = [str(place)]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delitem(sys.modules, "openrlhf.utils.agent", raising=False)
    agent = importlib.import_module("openrlhf.utils.agent")
    executor = agent.SingleTurnAgentExecutor(f"{service.url}/openrlhf")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    chat = [{"role": "user", "content": "Which?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    engine = Engine(tokenizer, ("bad", "good", "fair"))
    params = SimpleNamespace(max_tokens=16, logprobs=None)

    async def rollout() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(executor.execute(prompt, "no label", params, 512, tokenizer, engine) for _ in range(3))
        )

    (bad,), (good,), (fair,) = (sample["reward"] for sample in asyncio.run(rollout()))
    assert good > fair > bad
    assert service.cohorts.counts == {"samples": 3, "cohorts": 1, "incomplete": 0}
