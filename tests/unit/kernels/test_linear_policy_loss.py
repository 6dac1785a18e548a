"""The LM head fused with the loss against float64 autograd on the whole [rows, vocabulary] tensor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import OPTIONS, TEMPERATURES, make_case, relative, truth

from megatron_r1reward.kernels import lm_head
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import Flag, PolicyLossOptions, TokenInputs

ROWS, HIDDEN, VOCABULARY = 30, 16, 200


def head_case(
    dtype: torch.dtype = torch.float32, *, temperature: float = 1.0, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor, TokenInputs]:
    """(hidden [R, H], weight [V, H], inputs); logits as in `make_case`."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, HIDDEN, generator=generator) * 0.7).to(dtype)
    _, inputs = make_case(ROWS, vocabulary)
    scaled = (hidden.double() @ weight.double().t()) / temperature
    log_probs = scaled.log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    old = (log_probs - torch.linspace(-2.0, 2.5, ROWS)).float()
    assert inputs.reference_log_probs is not None and inputs.sampler_log_probs is not None
    sampler = old + (inputs.sampler_log_probs - inputs.old_log_probs)
    reference = (log_probs + 0.2).float()
    return hidden, weight, replace(inputs, old_log_probs=old, sampler_log_probs=sampler, reference_log_probs=reference)


def dense_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    temperature: float = 1.0,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(loss, d hidden, d weight) in float64."""
    expected = truth(hidden.double() @ weight.double().t(), inputs, options, temperature=temperature)
    gradient = expected.gradient
    return float(expected.loss.sum()), gradient @ weight.double(), gradient.t() @ hidden.double()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["torch", "triton", "triton_row"])
@pytest.mark.parametrize(("name", "chunk"), [("paper", 7), ("everything", 7), ("entropy", 1000), ("k3", 1)])
def test_matches_float64(name: str, chunk: int, implementation: str) -> None:
    options, temperature = OPTIONS[name], TEMPERATURES.get(name, 1.0)
    hidden, weight, inputs = head_case(temperature=temperature)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    head = HeadOptions(chunk_rows=chunk, implementation=implementation, temperature=temperature)
    output = linear_policy_loss(*leaves, inputs, options, head_options=head)
    (output.total * 0.5).backward()
    loss, grad_hidden, grad_weight = dense_gradients(hidden, weight, inputs, options, temperature)
    assert float(output.total.detach()) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert relative(leaves[0].grad, 0.5 * grad_hidden) < 1e-5
    assert relative(leaves[1].grad, 0.5 * grad_weight) < 1e-5


def test_bfloat16_and_wider_logits() -> None:
    """Rounding the logits is most of the error; keeping a chunk of them in float32 takes it away."""
    options = OPTIONS["paper"]
    hidden, weight, inputs = head_case(torch.bfloat16)
    _, grad_hidden, _ = dense_gradients(hidden, weight, inputs, options)
    errors = []
    for logits_dtype in (None, torch.float32):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_policy_loss(
            *leaves, inputs, options, head_options=HeadOptions(logits_dtype=logits_dtype)
        ).total.backward()
        errors.append(relative(leaves[0].grad, grad_hidden))
    assert errors[0] < 3e-2
    assert errors[1] < 6e-3
    assert errors[1] < errors[0]


def test_rows_without_a_loss_are_not_multiplied() -> None:
    """Their hidden states are NaN, which a product with them would show."""
    options = PolicyLossOptions()
    hidden, weight, inputs = head_case()
    advantages = torch.ones(ROWS)
    advantages[3], advantages[7], advantages[11] = 0.0, math.inf, math.nan
    inputs = replace(inputs, advantages=advantages)
    expected = dense_gradients(hidden, weight, inputs, options)
    idle = (inputs.weights == 0) | (advantages == 0) | ~advantages.isfinite()
    hidden[idle] = math.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_policy_loss(*leaves, inputs, options)
    output.total.backward()
    assert float(output.total.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert (leaves[0].grad[idle] == 0).all()
    assert relative(leaves[1].grad, expected[2]) < 1e-5
    assert (output.log_probs[idle] == 0).all()
    for row, flag in ((3, Flag.ACTIVE), (7, Flag.ACTIVE | Flag.REJECTED), (11, Flag.ACTIVE | Flag.REJECTED), (0, 0)):
        assert int(output.flags[row]) == flag


def test_no_row_has_a_loss() -> None:
    options = PolicyLossOptions()
    hidden, weight, inputs = head_case()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_policy_loss(*leaves, replace(inputs, weights=torch.zeros(ROWS)), options)
    output.total.backward()
    assert float(output.total) == 0.0
    assert (leaves[0].grad == 0).all()
    assert (leaves[1].grad == 0).all()


def test_forward_only_makes_no_gradient() -> None:
    options = OPTIONS["everything"]
    hidden, weight, inputs = head_case()
    with torch.no_grad():
        output = linear_policy_loss(hidden.requires_grad_(), weight.requires_grad_(), inputs, options)
    assert not output.total.requires_grad
    assert float(output.total) == pytest.approx(dense_gradients(hidden, weight, inputs, options)[0], rel=1e-5)


def test_a_second_backward_raises() -> None:
    options = PolicyLossOptions()
    hidden, weight, inputs = head_case()
    output = linear_policy_loss(hidden.requires_grad_(), weight, inputs, options)
    output.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        output.total.backward()


def test_context_parallel_ranks_pass_their_own_rows() -> None:
    """Two halves of the rows, each on its own: losses and weight gradients add up to the whole."""
    options = OPTIONS["everything"]
    hidden, weight, inputs = head_case()
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
    hidden, weight, inputs = head_case(torch.bfloat16)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    parameter.grad_added_to_main_grad = False
    parameter.zero_out_wgrad = True  # as for an LM head tied to the embedding
    plain = weight.clone().requires_grad_()
    for leaf in (parameter, plain):
        if fused:
            linear_policy_loss(hidden, leaf, inputs, options, head_options=HeadOptions(chunk_rows=4)).total.backward()
        else:
            log_probs, _ = linear_log_probs(hidden, leaf, inputs.targets, options=HeadOptions(chunk_rows=4))
            (log_probs * inputs.weights).sum().backward()
    added = parameter.main_grad - 1.0
    assert parameter.grad_added_to_main_grad is True
    assert (parameter.grad == 0).all()
    assert relative(added, plain.grad) < 5e-3  # plain.grad is rounded to bfloat16
    assert not torch.equal(added, added.bfloat16().float())


def test_sequence_level_ratio_by_recomputation() -> None:
    """A coefficient that depends on other tokens (GSPO's sequence ratio) trains through linear_log_probs."""
    hidden, weight, inputs = head_case()
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
        log_probs, _ = linear_log_probs(
            *leaves, inputs.targets, options=HeadOptions(chunk_rows=8, implementation=implementation)
        )
        loss(log_probs, old.float()).backward()
        for got, expected in zip(leaves, dense, strict=True):
            assert relative(got.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_log_probs_with_temperature_and_padded_vocabulary(implementation: str) -> None:
    hidden, weight, inputs = head_case()
    padded = torch.cat([weight, torch.full((8, HIDDEN), 5.0)])
    head = HeadOptions(temperature=0.7, vocab_size=VOCABULARY, implementation=implementation)
    log_probs, entropy = linear_log_probs(hidden, padded, inputs.targets, options=head)
    log_p = ((hidden.double() @ weight.double().t()) / 0.7).log_softmax(-1)
    assert relative(log_probs, log_p.gather(1, inputs.targets[:, None]).squeeze(1)) < 1e-6
    assert relative(entropy, -(log_p.exp() * log_p).sum(-1)) < 1e-6


def test_no_temporary_grows_with_rows_or_vocabulary() -> None:
    """The largest tensor made is a chunk of logits or a gradient of an input, never [rows, vocabulary]."""
    options = PolicyLossOptions()
    rows, vocabulary = 512, 3000
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
    _, inputs = make_case(rows, 8)
    inputs = replace(inputs, weights=torch.ones(rows))
    sizes: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in (result,) if isinstance(x, torch.Tensor))
            return result

    with Recorder():
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        linear_policy_loss(*leaves, inputs, options, head_options=HeadOptions(chunk_rows=16)).total.backward()
        log_probs, _ = linear_log_probs(*leaves, inputs.targets, options=HeadOptions(chunk_rows=16))
        log_probs.sum().backward()
    chunk, tile = 16 * vocabulary * 4, 4 * (1 << 18)
    assert max(sizes) <= max(chunk, tile, weight.nbytes, hidden.nbytes)
    assert max(sizes) < rows * vocabulary * 4 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"implementation": "cuda_cluster"}, "precision.kernels 'cuda_cluster' cannot be used: it does not support"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"implementation": "fast"}, "it is unknown; known are torch"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    hidden, weight, inputs = head_case()
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden, weight, inputs, PolicyLossOptions(), head_options=HeadOptions(**change))
    with pytest.raises(ValueError, match=r"do not fit an LM head"):
        linear_policy_loss(hidden[:, :4], weight, inputs, PolicyLossOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(5)}, r"weights has shape \(5,\) beside 30 rows"),
        ({"advantages": torch.ones(ROWS, dtype=torch.float64)}, r"advantages is torch.float64"),
        ({"reference_log_probs": None}, r"pass reference_log_probs"),
        ({"sampler_log_probs": None}, r"pass sampler_log_probs"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    hidden, weight, inputs = head_case()
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden, weight, replace(inputs, **change), OPTIONS["everything"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_rows_of_several_tiles_with_padding(dtype: torch.dtype) -> None:
    """One launch per chunk, a row of three tiles; clipped rows are left out of the products."""
    options, vocabulary = OPTIONS["everything"], 40_001
    hidden, weight, inputs = head_case(dtype, vocabulary=vocabulary)
    padded = torch.cat([weight, torch.full((7, HIDDEN), 5.0, dtype=dtype)])
    leaves = hidden.clone().requires_grad_(), padded.clone().requires_grad_()
    head = HeadOptions(chunk_rows=16, implementation="triton_row", vocab_size=vocabulary)
    output = linear_policy_loss(*leaves, inputs, options, head_options=head)
    output.total.backward()
    _, grad_hidden, grad_weight = dense_gradients(hidden, weight, inputs, options)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative(leaves[0].grad, grad_hidden) < tolerance
    assert relative(leaves[1].grad[:vocabulary], grad_weight) < tolerance
    assert (leaves[1].grad[vocabulary:] == 0).all()


def test_the_products_of_a_gpu_are_accepted_as_they_are_called() -> None:
    """bfloat16 operands, float32 results, in shape and dtype as torch checks them; no CPU kernel exists for these."""
    hidden, weight = (torch.empty(n, HIDDEN, dtype=torch.bfloat16, device="meta") for n in (8, 24))
    head = lm_head.Head.of_call(hidden, weight, None, HeadOptions(chunk_rows=8, implementation="torch"), None)
    rows = head.logits(hidden, weight, torch.empty(8, dtype=torch.int64, device="meta"), head.buffer(hidden, weight))
    assert (rows.logits.shape, rows.logits.dtype) == ((8, 24), torch.float32)
    gradient = torch.empty(24, HIDDEN, device="meta")
    lm_head.add_weight_gradient_(gradient, rows.logits.bfloat16(), hidden)
    assert (gradient.shape, gradient.dtype) == ((24, HIDDEN), torch.float32)


def test_chunks_follow_the_vocabulary() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert lm_head.default_chunk_rows(1_000, cpu, torch.float32) == lm_head.MAX_CHUNK_ROWS
    assert lm_head.default_chunk_rows(32_768, cpu, torch.float32) == 192
    assert lm_head.default_chunk_rows(151_936, gpu, torch.float32) == lm_head.GPU_CHUNK_ROWS
    assert lm_head.default_chunk_rows(151_936, gpu, torch.bfloat16) == 2 * lm_head.GPU_CHUNK_ROWS
