#!/bin/bash
# The reward model as a service (page, API, routes for other trainers) before its vLLM servers, until the time limit.
# Its address is in <run.output_dir>/live/serve.address.json and in the log; serve.host = "0.0.0.0" opens it.
#   sbatch slurm/serve.sh RUN.toml [section.key=value]...
#   slurm/serve.sh [sbatch options] RUN.toml [section.key=value]...     the same, with the defaults of slurm/site.sh
# Options of sbatch on the command line win over these defaults; docs/cluster.md explains layouts and requeueing.
#SBATCH --job-name=r1reward-serve
#SBATCH --nodes=1
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
# Slurm runs a copy of this file; then its record of the job says where the original is. The same in every job script.
this_script=serve.sh here=$(dirname "$(readlink -f "$0")")
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
run_stage serve "$@"
