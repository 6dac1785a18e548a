# Shared by the job scripts: the site's settings, then the supervisor, which is Python. Sourced, never run.
# Settings (slurm/site.sh, or the file that R1REWARD_SITE names; slurm/site.example.sh lists them):
#   R1REWARD_PYTHON            interpreter on the nodes that runs the supervisor; default: .venv beside this folder
#   R1REWARD_CONTAINER         pyxis image for all components; R1REWARD_MOUNTS: "source:target,..."
# shellcheck shell=bash

REPOSITORY=$(cd "${here:?set by the script that sources this}/.." && pwd)

enter_site() {
  local site=${R1REWARD_SITE:-$here/site.sh}
  if [[ -e $site ]]; then
    # shellcheck source=/dev/null
    source "$site"
  elif [[ -n ${R1REWARD_SITE:-} ]]; then
    echo "R1REWARD_SITE=$R1REWARD_SITE does not exist: name the site file, or unset it" >&2
    exit 2
  fi
  if [[ -z ${R1REWARD_PYTHON:-} ]]; then
    R1REWARD_PYTHON=python3
    if [[ -x $REPOSITORY/.venv/bin/python ]]; then R1REWARD_PYTHON=$REPOSITORY/.venv/bin/python; fi
  fi
  export PYTHONUNBUFFERED=1 PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
}

# Called by hand and not by sbatch: submit the script, options first, with the SBATCH_* defaults of the site file.
submit() { # script [sbatch options] RUN.toml [overrides]
  local script=$1 options=()
  shift
  while [[ ${1:-} == -* ]]; do
    options+=("$1")
    shift
  done
  exec sbatch ${options[@]+"${options[@]}"} "$script" "$@"
}

run_stage() { # stage script RUN.toml [overrides]
  local stage=$1 script=$2 run_file
  shift 2
  enter_site
  if [[ -z ${SLURM_JOB_ID:-} ]]; then submit "$script" "$@"; fi
  trap '' USR1 # until the supervisor takes it: the default action would end the job
  run_file=${1:?usage: sbatch $script RUN.toml [section.key=value]...}
  shift
  cd "$SLURM_SUBMIT_DIR" || exit
  local site=()
  if [[ -n ${R1REWARD_CONTAINER:-} ]]; then site+=("cluster.container_image=$R1REWARD_CONTAINER"); fi
  if [[ -n ${R1REWARD_MOUNTS:-} ]]; then site+=("cluster.container_mounts=[\"${R1REWARD_MOUNTS//,/\",\"}\"]"); fi
  # exec: the signals that Slurm sends to the batch script then reach the supervisor.
  exec "$R1REWARD_PYTHON" -m megatron_r1reward.cli launch "$stage" "$run_file" ${site[@]+"${site[@]}"} "$@"
}

exec_step() { # program arguments: one task, in the site's container where there is one
  local flags=()
  if [[ -n ${R1REWARD_CONTAINER:-} ]]; then
    flags+=("--container-image=$R1REWARD_CONTAINER" "--container-workdir=$SLURM_SUBMIT_DIR")
    flags+=("--container-mounts=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$REPOSITORY:$REPOSITORY${R1REWARD_MOUNTS:+,$R1REWARD_MOUNTS}")
    R1REWARD_PYTHON=python3
  fi
  cd "$SLURM_SUBMIT_DIR" || exit
  exec srun --ntasks=1 ${flags[@]+"${flags[@]}"} "$R1REWARD_PYTHON" "$@"
}
