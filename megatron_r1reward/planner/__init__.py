"""Memory, communication and time of a run before it is started, from the run file and the model's `config.json` alone.

Arithmetic only: neither torch nor megatron-core is imported, no weights and no GPU are needed.
"""
