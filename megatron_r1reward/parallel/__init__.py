"""Process groups, devices and the layer specs that megatron-core models are built from.

Importing this package adapts megatron-core to a machine without a GPU (`parallel.cpu`). That has to happen before
megatron-core itself is imported, so every package that imports `megatron.core` imports this one in its `__init__`.
"""

from megatron_r1reward.parallel import cpu

cpu.install()
