"""A trained reward model in use: ask it, compare two responses, rank many, score files."""
