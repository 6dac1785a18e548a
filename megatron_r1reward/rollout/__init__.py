"""Sampling from vLLM servers: starting them, asking them for rollouts, and pushing the trainer's weights into them."""
