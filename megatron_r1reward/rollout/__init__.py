"""Asking a pool of vLLM servers for samples, with exact accounting of every prompt."""
