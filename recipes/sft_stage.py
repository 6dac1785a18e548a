"""Stage 1, the long chain-of-thought cold start, through NeMo-Run.

.venv-recipes/bin/python recipes/sft_stage.py --run RUN.toml --executor local|slurm [section.key=value]...
"""

from __future__ import annotations

from launching.command import stage_command

app = stage_command("sft", "Stage 1, the long chain-of-thought cold start, through NeMo-Run.")

if __name__ == "__main__":
    app()
