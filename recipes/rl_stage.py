"""Stage 2, StableReinforce with rollout servers and judge, through NeMo-Run.

.venv-recipes/bin/python recipes/rl_stage.py --run RUN.toml --executor local|slurm [section.key=value]...
"""

from __future__ import annotations

from launching.command import stage_command

app = stage_command("rl", "Stage 2, StableReinforce with rollout servers and judge, through NeMo-Run.")

if __name__ == "__main__":
    app()
