"""vLLM's sampler and the trainer's LM head speak of the same distribution, at every temperature, with banned ids."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.lm_head import HeadOptions

pytestmark = pytest.mark.e2e

ROWS, HIDDEN, VOCABULARY = 64, 16, 300
BANNED = (7, 30, 31, *range(250, 300))


def sampled(logits: torch.Tensor, temperature: float, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs as vLLM's sampler gives them for requests with a logit bias on the banned ids."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    bias = LogitBiasLogitsProcessor(None, torch.device("cpu"), False)
    parameters = SimpleNamespace(logit_bias=dict.fromkeys(BANNED, -100.0))
    added = [(row, parameters, None, []) for row in range(ROWS)]
    bias.update_state(SimpleNamespace(batch_size=ROWS, removed=(), added=added, moved=()))
    zeros = torch.zeros(ROWS)
    metadata = SamplingMetadata(
        temperature=torch.full((ROWS,), temperature), all_greedy=False, all_random=True, top_p=None, top_k=None,
        generators={row: torch.Generator().manual_seed(row) for row in range(ROWS)}, max_num_logprobs=0,
        no_penalties=True, prompt_token_ids=None, frequency_penalties=zeros, presence_penalties=zeros,
        repetition_penalties=zeros + 1, output_token_ids=[[] for _ in range(ROWS)], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors([bias]),
    )  # fmt: skip
    output = Sampler(logprobs_mode=mode)(logits.clone(), metadata)
    return output.sampled_token_ids[:, 0].long(), output.logprobs_tensors.logprobs[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_those_of_what_was_sampled(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(ROWS, HIDDEN, generator=generator),
        torch.randn(VOCABULARY, HIDDEN, generator=generator),
    )
    logits = hidden @ weight.t()
    if temperature == 1.0:
        head, mode = HeadOptions(), "raw_logprobs"
    else:
        head, mode = HeadOptions(temperature=temperature, excluded_ids=BANNED), "processed_logprobs"
    tokens, log_probs = sampled(logits, temperature, mode)
    assert not torch.isin(tokens, torch.tensor(BANNED)).any()
    ours, _ = linear_log_probs(hidden, weight, tokens, options=head)
    torch.testing.assert_close(ours, log_probs, atol=2e-5, rtol=0)
    other, _ = linear_log_probs(hidden, weight, tokens, options=HeadOptions(temperature=2 * temperature))
    assert (other - log_probs).abs().mean() > 0.1
