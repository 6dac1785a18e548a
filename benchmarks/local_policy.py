"""Rollouts and verdicts of models that are small enough to sample in the trainer's own process.

    pool = LocalPool(folder)                    where the trainer expects a `RolloutPool`
    scorer = LocalScorer(section, LocalJudge(folder, lines))      where it expects a `RewardScorer`

Responses are drawn by transformers' `generate`, in float32, from the weights that the trainer pushes: the path through
vLLM (docs/rollout.md) costs more than an update of the demo's model. Log-probs are those of the untempered softmax, so
the trainer's own `mismatch/*` says at every step whether both compute the same.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from megatron_r1reward.config.schema import RewardSection, SamplingSection
from megatron_r1reward.data.packing import expand_images
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.data.prompt import judge_messages
from megatron_r1reward.model_folder.examine import load_tokenizer
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.reward.score import RewardScorer, ScoringBatch
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.banned import banned_token_ids
from megatron_r1reward.rollout.client import sample_seed
from megatron_r1reward.rollout.pool import GenerateResult
from megatron_r1reward.types import JudgeVerdict, Label, Prompt, Rollout, TensorMeta, WeightSpan

# Names in a Qwen2.5-VL folder -> in transformers' module.
_PLACES = ((re.compile(r"^visual\."), "model.visual."), (re.compile(r"^model\."), "model.language_model."))


def _in_module(name: str) -> str:
    for pattern, place in _PLACES:
        if pattern.match(name):
            return pattern.sub(place, name)
    return name


class LocalPool:
    """The part of `RolloutPool` that a run without servers needs.

    Args:
        lag: samples come from the weights of so many steps ago, at the start from the first; 0: from those pushed last.
        rows: responses drawn at once.
    """

    def __init__(self, folder: Path, images: ImageProcessor, *, lag: int = 0, rows: int = 128) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._parameters = dict(self._model.named_parameters())
        self._tokenizer = load_tokenizer(folder)
        self._images = images
        self._image_id = int(self._model.config.image_token_id)
        self._banned = sorted(banned_token_ids(folder))
        end = self._model.generation_config.eos_token_id
        self._ends = {end} if isinstance(end, int) else set(end)
        self._rows, self._version = rows, 0
        self._waiting: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=lag + 1)
        self.total = Accounting()
        self.clocks: dict[str, Any] = {}

    def push_weights(
        self, metas: Sequence[TensorMeta], named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """The weights of step `version`; those of `lag` steps before come into use."""
        self._waiting.append((version, {_in_module(name): tensor.detach().clone() for name, tensor in named_tensors}))
        self._use(*self._waiting[0])

    def use_newest(self) -> None:
        """No lag from here on: what was pushed last."""
        self._use(*self._waiting[-1])

    def _use(self, version: int, weights: dict[str, torch.Tensor]) -> None:
        self._version = version
        assert weights.keys() == self._parameters.keys(), sorted(weights.keys() ^ self._parameters.keys())
        with torch.no_grad():
            for name, tensor in weights.items():
                self._parameters[name].copy_(tensor)

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int = 1,
        seed: int,
        progress: object = None,
        arrived: Callable[[int, Sequence[Rollout]], None] | None = None,
    ) -> Future[GenerateResult]:
        """`RolloutPool.submit`, done when it returns."""
        future: Future[GenerateResult] = Future()
        size = max(1, self._rows // n)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        rollouts = [one for part in parts for one in self._draw(part, sampling, n=n, seed=seed)]
        if arrived is not None:
            for place in range(len(prompts)):
                arrived(place, rollouts[place * n : (place + 1) * n])
        account = Accounting(asked=len(prompts), answered=len(prompts), samples=len(rollouts), attempts=len(prompts))
        self.total += account
        future.set_result(GenerateResult(rollouts=tuple(rollouts), failed=(), quarantined=(), accounting=account))
        return future

    @torch.inference_mode()
    def _draw(self, prompts: Sequence[Prompt], sampling: SamplingSection, *, n: int, seed: int) -> Iterator[Rollout]:
        assert not sampling.tempered or sampling.temperature == 0, "log-probs are of the untempered softmax"
        images = [[self._images(path) for path in prompt.image_paths] for prompt in prompts]
        ids = [
            expand_images(prompt.token_ids, list(map(self._images.num_tokens, shown)), self._image_id)
            for prompt, shown in zip(prompts, images, strict=True)
        ]
        width = max(map(len, ids))
        input_ids = torch.zeros(len(ids), width, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, one in enumerate(ids):
            input_ids[row, width - len(one) :] = torch.tensor(one)
            mask[row, width - len(one) :] = 1
        flat = [image for shown in images for image in shown]
        pictures: dict[str, torch.Tensor] = {}
        if flat:
            pictures = {
                "pixel_values": torch.cat([image.pixel_values for image in flat]),
                "image_grid_thw": torch.tensor([image.grid for image in flat]),
                "mm_token_type_ids": ((input_ids == self._image_id) & (mask == 1)).int(),
            }
        greedy = sampling.temperature == 0
        draws: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sample_seed(seed, "|".join(prompt.id for prompt in prompts)))
            out = self._model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                **pictures,
                **draws,
                num_return_sequences=n,
                max_new_tokens=sampling.max_tokens,
                suppress_tokens=self._banned,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens_BT = out.sequences[:, width:]
        log_probs_BT = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]
        for row, (tokens, log_probs) in enumerate(zip(tokens_BT.tolist(), log_probs_BT.tolist(), strict=True)):
            yield self._rollout(prompts[row // n], row % n, tokens, log_probs)

    def _rollout(self, prompt: Prompt, sample: int, tokens: list[int], log_probs: list[float]) -> Rollout:
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        body = tokens if end is None else tokens[:end]
        decode = self._tokenizer.decode
        return Rollout(
            prompt=prompt,
            sample_index=sample,
            token_ids=tuple(kept),
            log_probs=tuple(log_probs[: len(kept)]),
            text=decode(kept, skip_special_tokens=True),
            finish_reason="length" if end is None else "stop",
            weight_spans=(WeightSpan(version=self._version, start=0, end=len(kept)),),
            special_tokens=decode(body, skip_special_tokens=False) != decode(body, skip_special_tokens=True),
        )

    def sleep(self) -> None:
        """Nothing is held that the trainer could use."""

    def sleep_metrics(self) -> dict[str, float]:
        return {}

    def status(self) -> list[Any]:
        return []


class LocalJudge:
    """The part of a `JudgeBatch` that scoring needs, over a judge model in this process: the likelier of "1" and "0",
    which is what a server constrained to the two replies at temperature 0."""

    counts_questions = False

    def __init__(self, folder: Path, *, reasoning_lines: int) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = load_tokenizer(folder)
        self._replies = [self._tokenizer.convert_tokens_to_ids(reply) for reply in ("0", "1")]
        self._lines = reasoning_lines
        self._known: dict[tuple[str, Label], JudgeVerdict] = {}
        self.counts: Counter[str] = Counter()
        self.clocks: dict[str, Any] = {}

    def ask(self, cases: Iterable[tuple[str, Label]]) -> None:
        """Nothing is asked ahead."""

    async def verdicts(self, cases: Sequence[tuple[str, Label]]) -> list[JudgeVerdict]:
        questions = [(self._tail(reasoning), answer) for reasoning, answer in cases]
        new = [case for case in dict.fromkeys(questions) if case not in self._known]
        self.counts = Counter(cached=len(set(questions)) - len(new))
        self._known |= dict(self._judged(new))
        return [self._known[case] for case in questions]

    def _tail(self, reasoning: str) -> str:
        lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
        return "\n".join(lines[-self._lines :])

    @torch.inference_mode()
    def _judged(self, cases: Sequence[tuple[str, Label]]) -> Iterator[tuple[tuple[str, Label], JudgeVerdict]]:
        by_length: dict[int, list[tuple[tuple[str, Label], list[int]]]] = {}  # no padding
        for case in cases:
            if not case[0]:
                yield case, "inconsistent"
                continue
            messages = judge_messages(case[0], f"Response {case[1]} is better.")
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            by_length.setdefault(len(ids), []).append((case, ids))
        for part in by_length.values():
            logits_BV = self._model(input_ids=torch.tensor([ids for _, ids in part])).logits[:, -1]
            for (case, _), says in zip(part, logits_BV[:, self._replies].argmax(-1).tolist(), strict=True):
                yield case, "consistent" if says else "inconsistent"


class LocalScorer(RewardScorer):
    """Scores with a `LocalJudge`; close it when done."""

    def __init__(self, section: RewardSection, judge: LocalJudge | None) -> None:
        super().__init__(section, judge)  # type: ignore[arg-type]  # it has what is used of one
        self._local = judge if section.use_judge else None
        self._calls = EventLoopThread("local-judge")

    @contextmanager
    def begin(self) -> Iterator[ScoringBatch]:
        yield ScoringBatch(self.rules, judge=self._local, loop=self._calls)  # type: ignore[arg-type]

    def close(self) -> None:
        self._calls.close()
