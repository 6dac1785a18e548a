"""Import Triton so that this process interprets its kernels on the CPU.

`TRITON_INTERPRET` is read when a kernel is decorated, Triton's own library included, so it has to be set before the
first import; child processes must not inherit it. Import this module before anything that imports Triton.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.experimental.gluon  # noqa: F401  (imported by the first launch, and checks the variable again)
import triton.language as tl
import triton.runtime.interpreter as interpreter

import megatron_r1reward.kernels.policy_loss.triton_rows  # noqa: F401

del os.environ["TRITON_INTERPRET"]

_convert_float = interpreter._convert_float


def _rounding_convert(values, source, target, rounding):
    """Round float32 to bfloat16 to nearest even, as the hardware does; Triton 3.6 and 3.9 truncate here."""
    if source != tl.float32 or target != tl.bfloat16:
        return _convert_float(values, source, target, rounding)
    bits = np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    is_nan = ((bits & 0x7F800000) == 0x7F800000) & ((bits & 0x007FFFFF) != 0)
    return np.where(is_nan, np.uint16(0x7FC0), rounded).reshape(values.shape)


interpreter._convert_float = _rounding_convert
