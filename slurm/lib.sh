# Shared by the job scripts: the site's settings, sbatch, then the supervisor, which is Python. Sourced, never run.
# Settings (slurm/site.sh, or the file that R1REWARD_SITE names; slurm/site.example.sh lists them):
#   R1REWARD_PYTHON            interpreter on the nodes that runs the supervisor; default: .venv beside this folder
#   R1REWARD_CONTAINER         pyxis image for all components; R1REWARD_MOUNTS: "source:target,..."
# shellcheck shell=bash

REPOSITORY=$(cd "${here:?set by the script that sources this}/.." && pwd)

die() { # message: what is wrong and how to mend it; ends with the exit code of a user's mistake
  echo "error: $1" >&2
  exit 2
}

enter_site() {
  local r1reward_site=${R1REWARD_SITE:-$here/site.sh}
  if [[ -e $r1reward_site ]]; then
    bash -n "$r1reward_site" || die "$r1reward_site is not a bash script: see the line above"
    # What sites and their module commands do is not written for -e and -u: a test that is false would end the job.
    set +euo pipefail
    # shellcheck source=/dev/null
    source "$r1reward_site"
    set -euo pipefail
  elif [[ -n ${R1REWARD_SITE:-} ]]; then
    die "R1REWARD_SITE=$R1REWARD_SITE does not exist: name the site file, or unset it"
  fi
  if [[ -z ${R1REWARD_PYTHON:-} ]]; then
    R1REWARD_PYTHON=python3
    if [[ -x $REPOSITORY/.venv/bin/python ]]; then R1REWARD_PYTHON=$REPOSITORY/.venv/bin/python; fi
  fi
  export PYTHONUNBUFFERED=1 PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
}

# Options of sbatch that take no value in a word of their own; all others do (man sbatch).
readonly FLAG_LETTERS=hHIkOQsvVW
readonly FLAG_NAMES=" contiguous exclusive get-user-env help hold ignore-pbs immediate nice no-kill no-requeue \
overcommit oversubscribe parsable propagate quiet reboot requeue share spread-job test-only usage use-min-nodes \
verbose version wait "

takes_next_word() { # option: whether its value is the next word, as sbatch reads it
  local option=$1 letters
  case $option in
    --*=*) return 1 ;;
    --*) [[ $FLAG_NAMES != *" ${option#--} "* ]] ;;
    *)
      letters=${option#-}
      while [[ -n $letters && $FLAG_LETTERS == *"${letters:0:1}"* ]]; do letters=${letters:1}; done
      ((${#letters} == 1)) # a letter with a value, and no value behind it
      ;;
  esac
}

# Splits what was given into `options` of sbatch and `rest`; `job_folder` is where the job will start.
split_options() { # [sbatch options] ARGUMENTS...
  local name value
  options=() rest=() job_folder=$PWD
  while [[ ${1:-} == -?* ]]; do
    name=$1 value=
    options+=("$1")
    shift
    if takes_next_word "$name"; then
      if (($# == 0)); then die "$name needs a value"; fi
      value=$1
      options+=("$value")
      shift
    fi
    case $name in
      -D | --chdir) job_folder=$value ;;
      --chdir=*) job_folder=${name#*=} ;;
      -D?*) job_folder=${name#-D} ;;
    esac
  done
  rest=("$@")
}

# A run file that is not there is found out now and not after the queue.
need_run_file() { # file folder
  local path=$1
  if [[ $path != /* ]]; then path=$2/$path; fi
  if [[ ! -f $path ]]; then die "run file $path does not exist: name it by its path in the folder where the job starts"; fi
}

# Called by hand and not by sbatch: submit the script, options first, with the SBATCH_* defaults of the site file.
submit() { # script: with `options` and `rest`
  command -v sbatch >/dev/null || die "there is no sbatch here: call $1 where Slurm's commands are"
  exec sbatch ${options[@]+"${options[@]}"} "$1" ${rest[@]+"${rest[@]}"}
}

run_stage() { # stage [sbatch options] RUN.toml [overrides]
  local stage=$1 script=$here/$this_script
  shift
  enter_site
  split_options "$@"
  if ((${#rest[@]} == 0)); then die "no run file; usage: slurm/$this_script [sbatch options] RUN.toml [section.key=value]..."; fi
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    need_run_file "${rest[0]}" "$job_folder"
    submit "$script"
  fi
  if ((${#options[@]})); then
    die "${options[*]}: this is job $SLURM_JOB_ID already, whose shape is given; leave the options out, or use sbatch"
  fi
  trap '' USR1 # until the supervisor takes it: the default action would end the job
  need_run_file "${rest[0]}" "$PWD"
  local site=()
  if [[ -n ${R1REWARD_CONTAINER:-} ]]; then site+=("cluster.container_image=$R1REWARD_CONTAINER"); fi
  if [[ -n ${R1REWARD_MOUNTS:-} ]]; then site+=("cluster.container_mounts=[\"${R1REWARD_MOUNTS//,/\",\"}\"]"); fi
  # exec: the signals that Slurm sends to the batch script then reach the supervisor.
  exec "$R1REWARD_PYTHON" -m megatron_r1reward.cli launch "$stage" "${rest[0]}" ${site[@]+"${site[@]}"} "${rest[@]:1}"
}

run_step() { # program [sbatch options] ARGUMENTS...: one task, in the site's container where there is one
  local program=$1 flags=()
  shift
  enter_site
  split_options "$@"
  if ((${#rest[@]} == 0)); then die "no arguments; usage: slurm/$this_script [sbatch options] ARGUMENTS..."; fi
  if [[ -z ${SLURM_JOB_ID:-} ]]; then submit "$here/$this_script"; fi
  if [[ -n ${R1REWARD_CONTAINER:-} ]]; then
    flags+=("--container-image=$R1REWARD_CONTAINER" "--container-workdir=$PWD")
    flags+=("--container-mounts=$PWD:$PWD,$REPOSITORY:$REPOSITORY${R1REWARD_MOUNTS:+,$R1REWARD_MOUNTS}")
    R1REWARD_PYTHON=python3
  fi
  exec srun --ntasks=1 ${flags[@]+"${flags[@]}"} "$R1REWARD_PYTHON" "$program" "${rest[@]}"
}
