#!/bin/bash
# The whole pipeline as a chain of jobs, each of which starts only when the one before has succeeded; if one fails, the
# rest is cancelled instead of waiting for ever. Run it on a login node:
#   slurm/pipeline.sh [--dry-run] [sbatch options] SFT.toml SELECT.toml RL.toml EVAL.toml [section.key=value]...
# "-" in place of a run file leaves that stage out. Overrides go to every stage. Prints one "stage job-id" per line.
set -euo pipefail
# Slurm runs a copy of this file; then its record of the job says where the original is. The same in every job script.
this_script=pipeline.sh here=$(dirname "$(readlink -f "$0")")
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
enter_site
dry_run=no arguments=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
done
split_options ${arguments[@]+"${arguments[@]}"}
if ((${#rest[@]} < 4)); then
  die "four run files, '-' for a stage that is left out; usage: $(sed -n '4s/^# *//p' "$here/$this_script")"
fi
files=("${rest[@]:0:4}")
for file in "${files[@]}"; do
  if [[ $file != - ]]; then need_run_file "$file" "$job_folder"; fi
done
stages=(sft select rl eval) scripts=(sft_stage.sh annotate.sh rl_stage.sh eval.sh)
before=
for i in 0 1 2 3; do
  [[ ${files[i]} != - ]] || continue
  name=${stages[i]^^}_OPTIONS
  read -ra own <<<"${!name:-}"
  command=(sbatch --parsable --kill-on-invalid-dep=yes ${before:+"--dependency=afterok:$before"})
  command+=(${options[@]+"${options[@]}"} ${own[@]+"${own[@]}"} "$here/${scripts[i]}" "${files[i]}" "${rest[@]:4}")
  if [[ $dry_run == yes ]]; then
    printf '%q ' "${command[@]}" && echo
    before="<id of ${stages[i]}>"
    continue
  fi
  # A federated cluster answers "id;cluster".
  before=$("${command[@]}" | cut -d';' -f1)
  echo "${stages[i]} $before"
done
