#!/bin/bash
# Checkpoints between Hugging Face and Megatron: the arguments are those of tools/convert_checkpoint.py.
#   sbatch slurm/convert.sh import|export|verify|inspect ARGUMENTS...
#   slurm/convert.sh [sbatch options] import|export|verify|inspect ARGUMENTS...     the same, with the defaults of slurm/site.sh
#SBATCH --job-name=r1reward-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail
# Slurm runs a copy of this file; then its record of the job says where the original is. The same in every job script.
this_script=convert.sh here=$(dirname "$(readlink -f "$0")")
if [[ ! -e $here/lib.sh ]]; then
  script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1) || true
  while [[ ! -f $script && $script == *' '* ]]; do script=${script% *}; done # arguments follow; a path may hold spaces
  here=$(dirname "$(readlink -f "$script")")
fi
if [[ ! -e $here/lib.sh ]]; then
  echo "error: $this_script does not find lib.sh, which lies beside it: submit it by its path in the checkout's slurm folder" >&2
  exit 2
fi
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"
run_step "$REPOSITORY/tools/convert_checkpoint.py" "$@"
