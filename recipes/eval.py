"""Held-out accuracy in both answer orders, through NeMo-Run.

.venv-recipes/bin/python recipes/eval.py --run RUN.toml --executor local|slurm [section.key=value]...
"""

from __future__ import annotations

from launching.command import stage_command

app = stage_command("eval", "Held-out accuracy in both answer orders, through NeMo-Run.")

if __name__ == "__main__":
    app()
