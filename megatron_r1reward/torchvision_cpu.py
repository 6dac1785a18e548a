"""Make the registry's torchvision importable next to a CPU-only torch: the one place that knows about it.

PyPI has torchvision built against CUDA only. With a CPU build of torch its C++ library cannot be loaded, so the
operators `nms` and `qnms` stay undeclared, and `import torchvision` dies while registering fake kernels for them.
Nothing here uses those operators; vLLM and transformers need torchvision's image transforms, which are plain Python.
Declaring the two schemas before the import is enough.

The declaration has to come first in every process, vLLM's workers and helper subprocesses included, so it is an
import hook that a `.pth` file starts with the interpreter: `python -m megatron_r1reward.torchvision_cpu install`.
The hook removes itself at the first import of torchvision and declares nothing where torch has CUDA or ROCm, or
where torchvision's library loaded by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PTH_NAME = "megatron_r1reward_torchvision_cpu.pth"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareBeforeImport(MetaPathFinder):
    """Declares the operator schemas when `torchvision` is about to be imported; finds no module itself."""

    def __init__(self) -> None:
        self.declared: object = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self.declared is None:
            self.declared = declare_operators()
        return None


def declare_operators() -> object:
    """Declare `torchvision::nms` and `torchvision::qnms` where nobody has; returns what must stay alive."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return "not needed"
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            torch._C._dispatch_find_schema_or_throw(f"torchvision::{name}", "")
        except RuntimeError:
            library.define(name + _SCHEMA)
    return library


def start() -> None:
    """Called by the `.pth` file at interpreter start; costs one small import."""
    if not any(isinstance(finder, _DeclareBeforeImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareBeforeImport())


def install(site_packages: Path) -> Path:
    """Write the `.pth` file into `site_packages` and return its path."""
    pth = site_packages / PTH_NAME
    pth.write_text("import megatron_r1reward.torchvision_cpu as _tv; _tv.start()\n")
    return pth


if __name__ == "__main__":
    import sysconfig

    if sys.argv[1:] != ["install"]:
        raise SystemExit("usage: python -m megatron_r1reward.torchvision_cpu install")
    print(f"wrote {install(Path(sysconfig.get_path('purelib')))}")
