#!/bin/bash
# StableReinforce: trainer, rollout servers and judge in one allocation.
#   sbatch slurm/rl_stage.sh RUN.toml [section.key=value]...
#   slurm/rl_stage.sh [sbatch options] RUN.toml [section.key=value]...     the same, with the defaults of slurm/site.sh
# Options of sbatch on the command line win over these defaults; docs/cluster.md explains layouts and requeueing.
#SBATCH --job-name=r1reward-rl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# Slurm runs a copy of this file; its record of the job knows where the original is.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1) || true
here=$(cd "$(dirname "${script:-$0}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"
run_stage rl "$here/rl_stage.sh" "$@"
