"""megatron-core is adapted to the CPU before a test module imports it."""

import megatron_r1reward.parallel  # noqa: F401
