"""Run unmodified megatron-core 0.16.1 on a CPU: the one place that adapts a library at run time.

megatron-core assumes CUDA by name (`torch.cuda.current_device()`, `device="cuda"`, `.cuda()`, CUDA RNG states). This
module answers those calls with their CPU meaning. Nothing of megatron-core is edited or re-implemented, and
`install()` does nothing of this when a GPU is present. Five kinds of interception:

A. functions of `torch.cuda` that megatron-core calls by name;
B. a `TorchFunctionMode` that maps `device="cuda"`, `Tensor.cuda()`, `Tensor.to("cuda")`, `pin_memory` and the
   `torch.cuda.FloatTensor` strings that megatron-core compares;
C. the RNG state getters of its CUDA RNG tracker;
D. gloo's `isend`, which keeps the tensor object but not its storage alive, while pipeline schedules free it;
E. the sizes of expert-parallel exchanges, which become plain numbers only on their way from the GPU to the CPU.

With and without a GPU: an Adam whose state can be resumed, where Transformer Engine and Apex are absent.

The mode is thread-local and survives `fork`; spawned processes call `install()` again.

`DEVICE` is what "cuda" means here. It is a variable for the tests' sake: they put a second device there, whose tensors
refuse to meet those of the CPU, so that what a GPU would refuse fails on a machine without one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cpu")
_installed: list[TorchFunctionMode] = []  # the entered mode; non-empty once installed in this process


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _called_from_megatron() -> bool:
    frame = sys._getframe(2)
    return "/megatron/core/" in frame.f_code.co_filename


_WITH_A_DEVICE = frozenset({torch.Tensor.pin_memory, torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type})


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs and func not in _WITH_A_DEVICE:  # nearly all of the hundred thousands of calls of a step
            return func(*args)
        kwargs = kwargs or {}
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": DEVICE}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(DEVICE)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], DEVICE, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_from_megatron():
            on_device = args[0].device == DEVICE
            return f"torch.cuda.{result.rsplit('.', 1)[1]}" if on_device else result
        return result


class _NoStream:
    """CPU work is synchronous: streams and events have nothing to order."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def record_event(self, event: _NoStream | None = None) -> _NoStream:
        return event or _NoStream()

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None: ...


def _get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.default_generator.set_state(state)


def _replace_cuda_functions() -> None:
    replacements: dict[str, object] = {
        "current_device": lambda: DEVICE,
        "synchronize": lambda *args, **kwargs: None,
        "set_device": lambda *args, **kwargs: None,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "current_stream": lambda *args, **kwargs: _NoStream(),
        "default_stream": lambda *args, **kwargs: _NoStream(),
        "stream": lambda stream: stream or _NoStream(),
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _import_megatron_without_compile() -> None:
    """megatron-core decorates its fused ops with `torch.compile` at import; on a CPU that costs a g++ run per op."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        import megatron.core.distributed
        import megatron.core.jit
        import megatron.core.models.gpt.gpt_model
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel

        megatron.core.jit.disable_jit_fuser()
    finally:
        torch.compile = compile_


def _send_an_alias() -> None:
    import torch.distributed.distributed_c10d as c10d

    isend = c10d.isend

    def isend_alias(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return isend(tensor.detach(), *args, **kwargs)

    c10d.isend = isend_alias
    torch.distributed.isend = isend_alias


def _exchange_sizes_as_numbers() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(tensor):
            return tensor
        return tensor.cpu().numpy() if as_numpy else tensor.cpu()

    token_dispatcher.maybe_move_tensor_to_cpu = on_cpu


def _use_an_adam_that_can_resume() -> None:
    """Where neither Transformer Engine nor Apex is installed, on a CPU or a GPU: megatron-core's branch for plain
    `torch.optim.Adam` saves a DistributedOptimizer and cannot resume it; the branch for their Adam can.
    `PlainFusedAdam` has its state layout."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    from megatron_r1reward.parallel.plain_adam import PlainFusedAdam

    optimizer.Adam = distrib_optimizer.Adam = PlainFusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True


def install() -> None:
    """Adapt megatron-core to the CPU for this process, once; with a GPU only its optimizer needs something."""
    if _installed:
        return
    if torch.cuda.is_available():
        _use_an_adam_that_can_resume()
        return
    _replace_cuda_functions()
    _import_megatron_without_compile()

    import megatron.core.tensor_parallel.random as rng

    rng._get_cuda_rng_state = _get_rng_state
    rng._set_cuda_rng_state = _set_rng_state
    _send_an_alias()
    _exchange_sizes_as_numbers()
    _use_an_adam_that_can_resume()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
