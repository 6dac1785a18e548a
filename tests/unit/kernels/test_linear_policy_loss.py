"""The LM head fused with the loss against float64 autograd on the whole [rows, vocabulary] tensor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import OPTIONS, make_case, relative, truth

from megatron_r1reward.kernels import head_chunks
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.policy_loss.flags import Flag
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs

ROWS, HIDDEN, VOCABULARY = 30, 16, 200


def head_case(
    options: PolicyLossOptions, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor, TokenInputs]:
    """(hidden [R, H], weight [V, H], inputs); logits as in `make_case`."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, HIDDEN, generator=generator) * 0.7).to(dtype)
    _, inputs = make_case(ROWS, vocabulary, options)
    scaled = (hidden.double() @ weight.double().t()) / options.temperature
    log_probs = scaled.log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    old = (log_probs - torch.linspace(-2.0, 2.5, ROWS)).float()
    assert inputs.reference_log_probs is not None and inputs.sampler_log_probs is not None
    sampler = old + (inputs.sampler_log_probs - inputs.old_log_probs)
    reference = (log_probs + 0.2).float()
    return hidden, weight, replace(inputs, old_log_probs=old, sampler_log_probs=sampler, reference_log_probs=reference)


def dense_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(loss, d hidden, d weight) in float64."""
    expected = truth(hidden.double() @ weight.double().t(), inputs, options)
    gradient = expected.gradient
    return float(expected.loss.sum()), gradient @ weight.double(), gradient.t() @ hidden.double()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(("name", "chunk"), [("paper", 7), ("everything", 7), ("entropy", 1000), ("k3", 1)])
def test_matches_float64(name: str, chunk: int, implementation: str) -> None:
    options = OPTIONS[name]
    hidden, weight, inputs = head_case(options)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = linear_policy_loss(*leaves, inputs, options, chunk_rows=chunk, implementation=implementation)
    (output.total * 0.5).backward()
    loss, grad_hidden, grad_weight = dense_gradients(hidden, weight, inputs, options)
    assert float(output.total.detach()) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert relative(leaves[0].grad, 0.5 * grad_hidden) < 1e-5
    assert relative(leaves[1].grad, 0.5 * grad_weight) < 1e-5


def test_bfloat16_and_wider_logits() -> None:
    """Rounding the logits is most of the error; keeping a chunk of them in float32 takes it away."""
    options = OPTIONS["paper"]
    hidden, weight, inputs = head_case(options, torch.bfloat16)
    _, grad_hidden, _ = dense_gradients(hidden, weight, inputs, options)
    errors = []
    for logits_dtype in (None, torch.float32):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_policy_loss(*leaves, inputs, options, logits_dtype=logits_dtype).total.backward()
        errors.append(relative(leaves[0].grad, grad_hidden))
    assert errors[0] < 3e-2
    assert errors[1] < 6e-3
    assert errors[1] < errors[0]


def test_rows_without_a_loss_are_not_multiplied() -> None:
    """Their hidden states are NaN, which a product with them would show."""
    options = PolicyLossOptions(filter="paper")
    hidden, weight, inputs = head_case(options)
    advantages = torch.ones(ROWS)
    advantages[3], advantages[7], advantages[11] = 0.0, 9.0, math.nan
    inputs = replace(inputs, advantages=advantages, standardization=None)
    expected = dense_gradients(hidden, weight, inputs, options)
    idle = (inputs.weights == 0) | (advantages == 0) | ~(advantages.abs() <= 3)
    hidden[idle] = math.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_policy_loss(*leaves, inputs, options)
    output.total.backward()
    assert float(output.total.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert (leaves[0].grad[idle] == 0).all()
    assert relative(leaves[1].grad, expected[2]) < 1e-5
    assert (output.log_probs[idle] == 0).all()
    for row, flag in ((3, Flag.ACTIVE), (7, Flag.ACTIVE | Flag.FILTERED), (11, Flag.ACTIVE | Flag.FILTERED), (0, 0)):
        assert int(output.flags[row]) == flag


def test_no_row_has_a_loss() -> None:
    options = PolicyLossOptions()
    hidden, weight, inputs = head_case(options)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_policy_loss(*leaves, replace(inputs, weights=torch.zeros(ROWS)), options)
    output.total.backward()
    assert float(output.total) == 0.0
    assert (leaves[0].grad == 0).all()
    assert (leaves[1].grad == 0).all()


def test_forward_only_makes_no_gradient() -> None:
    options = OPTIONS["everything"]
    hidden, weight, inputs = head_case(options)
    with torch.no_grad():
        output = linear_policy_loss(hidden.requires_grad_(), weight.requires_grad_(), inputs, options)
    assert not output.total.requires_grad
    assert float(output.total) == pytest.approx(dense_gradients(hidden, weight, inputs, options)[0], rel=1e-5)


def test_a_second_backward_raises() -> None:
    options = PolicyLossOptions()
    hidden, weight, inputs = head_case(options)
    output = linear_policy_loss(hidden.requires_grad_(), weight, inputs, options)
    output.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        output.total.backward()


def test_context_parallel_ranks_pass_their_own_rows() -> None:
    """Two halves of the rows, each on its own: losses and weight gradients add up to the whole."""
    options = OPTIONS["everything"]
    hidden, weight, inputs = head_case(options)
    whole_weight = weight.clone().requires_grad_()
    whole = linear_policy_loss(hidden, whole_weight, inputs, options)
    whole.total.backward()
    parts_weight, total = weight.clone().requires_grad_(), 0.0
    for rows in (torch.arange(0, ROWS, 2), torch.arange(1, ROWS, 2)):
        part = linear_policy_loss(hidden[rows], parts_weight, inputs.take(rows), options)
        part.total.backward()
        total += float(part.total.detach())
    assert total == pytest.approx(float(whole.total.detach()), rel=1e-5)
    torch.testing.assert_close(parts_weight.grad, whole_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["loss", "log_probs"])
def test_weight_gradient_goes_into_main_grad(fused: bool) -> None:
    """Megatron's float32 buffer takes bfloat16 gradients without rounding them in between; autograd gets a stand-in."""
    options = OPTIONS["paper"]
    hidden, weight, inputs = head_case(options, torch.bfloat16)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = True  # as for an LM head tied to the embedding
    plain = weight.clone().requires_grad_()
    for leaf in (parameter, plain):
        if fused:
            linear_policy_loss(hidden, leaf, inputs, options, chunk_rows=4).total.backward()
        else:
            log_probs, _ = linear_log_probs(hidden, leaf, inputs.targets, chunk_rows=4)
            (log_probs * inputs.weights).sum().backward()
    added = parameter.main_grad - 1.0
    assert parameter.grad_added_to_main_grad is True
    assert (parameter.grad == 0).all()
    assert relative(added, plain.grad) < 5e-3  # plain.grad is rounded to bfloat16
    assert not torch.equal(added, added.bfloat16().float())


def test_sequence_level_ratio_by_recomputation() -> None:
    """A coefficient that depends on other tokens (GSPO's sequence ratio) trains through linear_log_probs."""
    hidden, weight, inputs = head_case(PolicyLossOptions())
    sequence = torch.arange(ROWS) // 10
    advantage = torch.tensor([1.0, -0.5, 2.0])

    def loss(log_probs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        gap = torch.zeros(3, dtype=log_probs.dtype).index_add(0, sequence, (log_probs - old) / 10)
        ratio = gap.exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()

    dense = [x.double().clone().requires_grad_() for x in (hidden, weight)]
    log_p = (dense[0] @ dense[1].t()).log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    old = log_p.detach() - 0.05
    loss(log_p, old).backward()
    for implementation in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        log_probs, _ = linear_log_probs(*leaves, inputs.targets, chunk_rows=8, implementation=implementation)
        loss(log_probs, old.float()).backward()
        for got, expected in zip(leaves, dense, strict=True):
            assert relative(got.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_log_probs_with_temperature_and_padded_vocabulary(implementation: str) -> None:
    hidden, weight, inputs = head_case(PolicyLossOptions())
    padded = torch.cat([weight, torch.full((8, HIDDEN), 5.0)])
    log_probs, entropy = linear_log_probs(
        hidden, padded, inputs.targets, temperature=0.7, vocab_size=VOCABULARY, implementation=implementation
    )
    log_p = ((hidden.double() @ weight.double().t()) / 0.7).log_softmax(-1)
    assert relative(log_probs, log_p.gather(1, inputs.targets[:, None]).squeeze(1)) < 1e-6
    assert relative(entropy, -(log_p.exp() * log_p).sum(-1)) < 1e-6


def test_no_temporary_grows_with_rows_or_vocabulary() -> None:
    """The largest tensor made is a chunk of logits or a gradient of an input, never [rows, vocabulary]."""
    options = PolicyLossOptions()
    rows, vocabulary = 512, 3000
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
    _, inputs = make_case(rows, 8, options)
    inputs = replace(inputs, weights=torch.ones(rows))
    sizes: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in (result,) if isinstance(x, torch.Tensor))
            return result

    with Recorder():
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        linear_policy_loss(*leaves, inputs, options, chunk_rows=16).total.backward()
        log_probs, _ = linear_log_probs(*leaves, inputs.targets, chunk_rows=16)
        log_probs.sum().backward()
    chunk, tile = 16 * vocabulary * 4, 4 * (1 << 18)
    assert max(sizes) <= max(chunk, tile, weight.nbytes, hidden.nbytes)
    assert max(sizes) < rows * vocabulary * 4 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"implementation": "triton_row"}, "inside the LM head only row kernels run"),
        ({"implementation": "fast"}, "it is unknown; known are torch"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    hidden, weight, inputs = head_case(PolicyLossOptions())
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden, weight, inputs, PolicyLossOptions(), **change)
    with pytest.raises(ValueError, match=r"do not fit an LM head"):
        linear_policy_loss(hidden[:, :4], weight, inputs, PolicyLossOptions())


def test_chunks_follow_the_vocabulary() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert head_chunks.default_chunk_rows(1_000, cpu) == head_chunks.MAX_CHUNK_ROWS
    assert head_chunks.default_chunk_rows(32_768, cpu) == 192
    assert head_chunks.default_chunk_rows(151_936, gpu) == head_chunks.GPU_CHUNK_ROWS
