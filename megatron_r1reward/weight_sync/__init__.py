"""Weights from the trainer into running vLLM servers: a protocol, and transports whose two halves bear one name."""
