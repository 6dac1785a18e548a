"""Memory, communication and time of a run before it is started, from the run file and the model's `config.json` alone:
neither weights nor a GPU are needed.
"""
