"""Model families on megatron-core."""

import megatron_r1reward.parallel  # noqa: F401  (before megatron.core)
