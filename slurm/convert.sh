#!/bin/bash
# Checkpoints between Hugging Face and Megatron: the arguments are those of tools/convert_checkpoint.py.
#   sbatch slurm/convert.sh import|export|verify|inspect ARGUMENTS...
#SBATCH --job-name=r1reward-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
# Slurm runs a copy of this file; its record of the job knows where the original is.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -n 1) || true
here=$(cd "$(dirname "${script:-$0}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"
enter_site
exec_step "$REPOSITORY/tools/convert_checkpoint.py" "$@"
