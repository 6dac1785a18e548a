"""A second device for tests, in Python: its tensors hold CPU values and obey a GPU's rules.

Gloo on a CPU accepts what a GPU refuses: one tensor on the host is enough to end a run there. Tensors on `DEVICE` say
so, compute real numbers, and raise `DeviceError` where CUDA would:

- an operator between both sides (a host scalar may join pointwise operators, host indices may index device tensors,
  `copy_` and `to` cross: as under CUDA);
- a device result written into a host tensor, or the reverse;
- a collective over host tensors in a group that was not made for gloo by name: nccl takes none;
- `numpy()` of a device tensor, and a host tensor among the arguments of a row kernel.

Every operator for which the host would wait until the device is done is counted in `waits` while `watching`: results or
sizes that become numbers on the host, copies to the host, and copies from the host that nobody called non-blocking.

Use, in a forked process that does nothing else afterwards:

    second_device.install()      # the adapter's "cuda" means DEVICE from here on
    with second_device.Rules():
        ...

Not there: streams and events, asynchronous errors, what CUDA kernels refuse (dtypes, sizes), memory, nccl's order of
calls, a random generator of its own, and whatever asks for `device.type == "cuda"`: those decisions are listed, with
what a GPU takes, in `tests/unit/parallel/test_device_decisions.py`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second")
DEVICE = torch.device("second", 0)
HOST = torch.device("cpu")

_COPIES = frozenset({"aten::copy_", "aten::_to_copy", "aten::_copy_from"})
_INDEXED = frozenset({"aten::index", "aten::_unsafe_index"})
_INDEX_WRITES = frozenset({"aten::index_put_", "aten::index_put", "aten::_index_put_impl_"})
# Implemented as pointwise operators without the tag: a scalar of the host may join.
_LIKE_POINTWISE = frozenset({"aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_"})
# Their results, or the sizes of their results, are numbers on the host.
_ANSWERS_THE_HOST = frozenset(
    {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
     "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount", "aten::equal", "aten::is_nonzero"}
)  # fmt: skip
# The backend places the tensors of these itself.
_PLACED_BY_BACKEND = frozenset({"c10d::barrier", "c10d::monitored_barrier_"})


class DeviceError(RuntimeError):
    """What a GPU would refuse."""


class DeviceTensor(torch.Tensor):
    """A tensor on the device; `host` holds its values: a CPU tensor of the same sizes and strides, shared by views."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, host: torch.Tensor, requires_grad: bool = False) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return DeviceTensor(self.host)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """What C++ sees and the values change together."""
        if not isinstance(value, DeviceTensor):
            raise DeviceError(f"a device tensor was given the data of a tensor on {value.device}")
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.host = value.host

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        _count_wait("tolist")
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise DeviceError("a device tensor has no numpy(): copy it to the host first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        memo[id(self)] = copied = DeviceTensor(self.host.clone(), requires_grad=self.requires_grad)
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"


class Rules(TorchDispatchMode):
    """While it is active in a thread, factories make device tensors where asked, and operators are checked."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the detour takes a tenth of a test's time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(func, args, kwargs or {})


# --- where the host waits ---------------------------------------------------------------------------------------------

waits: Counter[str] = Counter()  # "file.py::function" of the innermost frame of the project, or of megatron-core
collectives: Counter[str] = Counter()  # of groups of the device: there a rank that waits keeps its device busy
_watching = False


@contextmanager
def watching() -> Iterator[None]:
    """Count waits in here; backward passes run in threads of autograd's own, so this is one switch for all threads."""
    global _watching
    before, _watching = _watching, True
    try:
        yield
    finally:
        _watching = before


def _count_wait(name: str) -> None:
    if _watching:
        waits[f"{_place()} {name.removeprefix('aten::').strip('_')}"] += 1


def _place() -> str:
    frame: FrameType | None = sys._getframe(1)
    in_megatron = None
    while frame is not None:
        file = frame.f_code.co_filename
        if "/megatron_r1reward/" in file and not file.endswith("parallel/cpu.py"):
            return f"{file.rsplit('/megatron_r1reward/', 1)[1]}::{frame.f_code.co_name}"
        if in_megatron is None and "/megatron/core/" in file:
            in_megatron = f"megatron.core/{file.rsplit('/megatron/core/', 1)[1]}::{frame.f_code.co_name}"
        frame = frame.f_back
    return in_megatron or "elsewhere"


def _waits_for_device(name: str, args: Any, kwargs: Any, result_on_device: bool) -> bool:
    if name in _ANSWERS_THE_HOST:
        return True
    if name in _COPIES:
        source, target_on_device = args[0], result_on_device
        if name == "aten::copy_":
            target_on_device, source = isinstance(args[0], DeviceTensor), args[1]
        elif name == "aten::_copy_from":
            target_on_device = isinstance(args[1], DeviceTensor)
        crosses = isinstance(source, DeviceTensor) != target_on_device
        non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)
        return crosses and not non_blocking
    if name in _INDEXED | _INDEX_WRITES:
        single = name in _INDEX_WRITES and args[2].numel() == 1  # becomes masked_fill
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        return any(not isinstance(i, DeviceTensor) or (i.dtype == torch.bool and not single) for i in indices)
    return False


# --- the rules --------------------------------------------------------------------------------------------------------


def _check(operator: _Operator, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
    name = operator.name
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    theirs = [t for t in tensors if not isinstance(t, DeviceTensor) and t.device.type == "cpu"]
    if operator.collective:
        if _in_host_group(args, kwargs):
            return
        collectives[_place()] += 1
        if theirs and name not in _PLACED_BY_BACKEND:
            raise DeviceError(f"{name} of a host tensor {tuple(theirs[0].shape)} in a group of the device")
        return
    if not ours or not theirs or name in _COPIES:
        return
    if name in _INDEXED | _INDEX_WRITES:
        written = args[2] if name in _INDEX_WRITES else None
        if not isinstance(args[0], DeviceTensor):
            raise DeviceError(f"{name}: a host tensor is indexed by, or given, device tensors")
        if written is not None and not isinstance(written, DeviceTensor) and written.dim():
            raise DeviceError(f"{name}: a host tensor is written into a device tensor")
        return
    if not operator.pointwise or any(t.dim() for t in theirs):
        sides = [("device" if isinstance(t, DeviceTensor) else "host", tuple(t.shape)) for t in tensors]
        raise DeviceError(f"{name} between both sides: {sides}")
    for value in operator.written_values(args, {}):
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor):
            raise DeviceError(f"{name}: a device result is written into a host scalar")


def _in_host_group(args: Any, kwargs: Any) -> bool:
    for value in [*args, *kwargs.values()]:
        if isinstance(value, torch.ScriptObject):
            try:
                if dist.ProcessGroup.unbox(value).group_name in _host_groups:  # type: ignore[attr-defined]
                    return True
            except (RuntimeError, TypeError):
                continue  # a ReduceOp
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Operator:
    """What the schema of an operator says: torch makes it anew at each question, a fifth of a test's time."""

    name: str
    overload: str
    collective: bool
    pointwise: bool
    may_wait: bool  # the host for the device: whether it does depends on the arguments
    changes_sizes: bool  # of the tensor object that it is given
    written: tuple[tuple[int, str], ...]  # places and names of the arguments that it writes

    @staticmethod
    def of(func: Any) -> _Operator:
        schema = func._schema
        return _Operator(
            name=schema.name,
            overload=schema.overload_name,
            collective=schema.name.startswith("c10d::"),
            pointwise=torch.Tag.pointwise in func.tags or schema.name in _LIKE_POINTWISE,
            may_wait=schema.name in _COPIES | _ANSWERS_THE_HOST | _INDEXED | _INDEX_WRITES,
            changes_sizes=torch.Tag.inplace_view in func.tags,
            written=tuple(
                (number, argument.name)
                for number, argument in enumerate(schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ),
        )

    def written_values(self, args: Any, kwargs: Any) -> list[Any]:
        return [args[number] if number < len(args) else kwargs.get(name) for number, name in self.written]


_operators: dict[int, _Operator] = {}  # by the identity of torch's object, which lives as long as the process


def _execute(func: Any, args: Any, kwargs: Any) -> Any:
    """Check, count, compute on the host's values, and put the result on the side where it belongs.

    Run for each operator of a step: what an operator cannot need is not asked.
    """
    operator = _operators.get(id(func))
    if operator is None:
        operator = _operators[id(func)] = _Operator.of(func)
    tensors: list[torch.Tensor] = []
    host_args, host_kwargs = _on_the_host(args, tensors), _on_the_host(kwargs, tensors)
    ours = sum(type(tensor) is DeviceTensor for tensor in tensors)
    if operator.collective or 0 < ours < len(tensors):
        _check(operator, args, kwargs, tensors)
    on_device = ours > 0
    if kwargs:
        wanted = kwargs.get("device")
        if wanted is not None:
            on_device = torch.device(wanted).type == DEVICE.type
            if on_device:
                host_kwargs["device"] = HOST
        if kwargs.get("pin_memory"):
            host_kwargs["pin_memory"] = False
    if operator.may_wait and (ours or on_device) and _waits_for_device(operator.name, args, kwargs, on_device):
        _count_wait(operator.name)
    result = _call(func, operator, host_args, host_kwargs)
    written = _written(operator, args, kwargs) if operator.written else {}
    if operator.changes_sizes:
        for tensor in written.values():
            torch._C.TensorBase.data.__set__(tensor, DeviceTensor(tensor.host))  # type: ignore[attr-defined]
    return _outward(result, written) if on_device else result


def _on_the_host(value: Any, found: list[torch.Tensor]) -> Any:
    """An operator's arguments with the values of device tensors, and the tensors among them. They are nested in lists,
    tuples and dicts only (torch's own trees take a third of a test's time)."""
    kind = type(value)
    if kind is DeviceTensor:
        found.append(value)
        return value.host
    if kind is tuple or kind is list:
        return kind([_on_the_host(item, found) for item in value])
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, dict):
        return {key: _on_the_host(item, found) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):  # e.g. torch.Size
        return kind([_on_the_host(item, found) for item in value])
    return value


def _outward(value: Any, written: dict[int, DeviceTensor]) -> Any:
    """A result on the device: in-place operators return the tensors that they were given."""
    if isinstance(value, torch.Tensor):
        if type(value) is DeviceTensor:
            return value
        given = written.get(id(value)) if written else None
        return DeviceTensor(value) if given is None else given
    if isinstance(value, (list, tuple)):
        return type(value)([_outward(item, written) for item in value])
    return value


_WIDER = {"aten::mm": torch.ops.aten.mm.out, "aten::addmm": torch.ops.aten.addmm.out}


def _call(func: Any, operator: _Operator, args: Any, kwargs: Any) -> Any:
    """Products whose result is wider than their operands exist on a GPU only: here the operands are widened."""
    plain = _WIDER.get(operator.name) if operator.overload == "dtype_out" else None
    if plain is None:
        return func(*args, **kwargs)
    *operands, dtype = args
    return plain(*(operand.to(dtype) for operand in operands), **kwargs)


def _written(operator: _Operator, args: Any, kwargs: Any) -> dict[int, DeviceTensor]:
    """The device tensors that an operator writes, by the identity of their values: in-place operators return them."""
    found = {}
    for value in operator.written_values(args, kwargs):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, DeviceTensor):
                found[id(item.host)] = item
    return found


# --- below the Python dispatcher: `torch.tensor(..., device=)` and autograd's threads ---------------------------------

_library = torch.library.Library("aten", "IMPL")


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> DeviceTensor:
    layout = memory_format or torch.contiguous_format
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=layout, device=HOST))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> DeviceTensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype, device=HOST))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if _waits_for_device("aten::_copy_from", (source, target, non_blocking), {}, isinstance(target, DeviceTensor)):
        _count_wait("copy_from")
    here, there = (t.host if isinstance(t, DeviceTensor) else t for t in (source, target))
    there.copy_(here)
    return target


def _local_scalar(tensor: DeviceTensor) -> Any:
    _count_wait("local_scalar_dense")
    return tensor.host.item()


_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_local_scalar_dense", _local_scalar, "PrivateUse1")

# --- what needs more than operators -----------------------------------------------------------------------------------

_host_groups: set[str] = set()  # made for gloo by name: on a GPU they exist beside nccl's


def install() -> None:
    """The adapter's "cuda" means the device in this process, groups are those of a GPU, the micro-batch loop is
    watched. Once, before anything is built."""
    from megatron_r1reward.kernels import lm_head
    from megatron_r1reward.parallel import cpu, specs
    from megatron_r1reward.training import schedule
    from megatron_r1reward.weight_sync.shared_memory import MemoryFile

    cpu.DEVICE = DEVICE
    specs.causal_lower_right = _outside(specs.causal_lower_right)
    _groups_of_a_gpu()
    _moves_keep_attributes()
    schedule.get_forward_backward_func = _watched(schedule.get_forward_backward_func)
    lm_head.row_kernels = _checked(lm_head.row_kernels)
    MemoryFile.pin = lambda self: None  # type: ignore[method-assign]  # the device's memory is the host's


def _outside(describe: Callable[..., Any]) -> Callable[..., Any]:
    """Descriptions of masks are tensors without values, of a class that no mode may wrap."""

    def made(*sizes: int) -> Any:
        with _disable_current_modes():
            return describe(*sizes)

    return made


def _groups_of_a_gpu() -> None:
    """Objects travel through the device, as with nccl; only groups that name gloo take host tensors."""
    c10d._get_object_coll_device = lambda group=None: str(DEVICE)  # type: ignore[assignment]
    backend_of = dist.ProcessGroup._get_backend  # type: ignore[attr-defined]
    dist.ProcessGroup._get_backend = lambda self, device: backend_of(self, HOST)  # type: ignore[attr-defined]
    new_group = c10d.new_group

    def named(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        asked = kwargs.get("backend") or (args[2] if len(args) > 2 else None)
        if asked == "gloo" and isinstance(group, dist.ProcessGroup):  # else this rank is no member
            _host_groups.add(group.group_name)
        return group

    c10d.new_group = dist.new_group = named


def _moves_keep_attributes() -> None:
    """`module.to(DEVICE)` makes new parameters where CUDA keeps the objects: they get the attributes of the old."""
    apply = torch.nn.Module._apply

    def keeping(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        before = {name: dict(vars(p)) for name, p in self._parameters.items() if p is not None}
        apply(self, fn, recurse)
        for name, attributes in before.items():
            vars(self._parameters[name]).update({k: v for k, v in attributes.items() if k != "host"})
        return self

    torch.nn.Module._apply = keeping  # type: ignore[method-assign,assignment]


def _watched(get_schedule: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
    def get() -> Callable[..., Any]:
        def run(**arguments: Any) -> Any:
            with watching():
                return get_schedule()(**arguments)

        return run

    return get


def _checked(row_kernels: Callable[[str], Any]) -> Callable[[str], Any]:
    """The row kernels, refusing host tensors among their arguments."""

    class Checked:
        def __init__(self, name: str) -> None:
            self._kernels = row_kernels(name)

        def __getattr__(self, kernel: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                for leaf in tree_leaves((args, kwargs)):
                    fields = vars(leaf).values() if hasattr(leaf, "__dataclass_fields__") else (leaf,)
                    host = [t for t in fields if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)]
                    if host:
                        raise DeviceError(f"the row kernel {kernel} was given a host tensor {tuple(host[0].shape)}")
                return getattr(self._kernels, kernel)(*args, **kwargs)

            return call

    return Checked
