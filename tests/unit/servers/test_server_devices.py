"""A server step starts without torch where there is no GPU that torch could know of."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_r1reward.servers.command import has_driver, sees_gpu


def test_it_says_what_torch_says() -> None:
    assert sees_gpu() == torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.skipif(has_driver(), reason="about a machine without NVIDIA's driver")
def test_a_server_step_does_not_import_torch() -> None:
    program = (
        "import sys, megatron_r1reward.cli, megatron_r1reward.launch.server_main\n"
        "from megatron_r1reward.servers.command import sees_gpu\n"
        "assert not sees_gpu()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
