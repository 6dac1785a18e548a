"""Weights from the trainer into the rollout servers: pushed to all, verified, and pushed again to who missed a push.

fleet.PoolPusher -> protocol.WeightPush -> a transport's sender  ~~>  vllm_worker, in each of vLLM's workers
                    buckets.Recording --^
"""


class WeightPushError(RuntimeError):
    """A push did not complete. Servers that may hold a mixture of old and new weights stay paused."""
