"""The two training stages and what they share."""

import megatron_r1reward.parallel  # noqa: F401  (before megatron.core)
