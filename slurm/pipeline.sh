#!/bin/bash
# The whole pipeline as a chain of jobs, each of which starts only when the one before has succeeded; if one fails, the
# rest is cancelled instead of waiting for ever. Run it on a login node:
#   slurm/pipeline.sh [--dry-run] [sbatch options] SFT.toml SELECT.toml RL.toml EVAL.toml [section.key=value]...
# "-" in place of a run file leaves that stage out. Overrides go to every stage. Prints one "stage job-id" per line.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"
enter_site
dry_run=no options=()
while [[ ${1:-} == -?* ]]; do
  if [[ $1 == --dry-run ]]; then dry_run=yes; else options+=("$1"); fi
  shift
done
if (($# < 4)); then
  sed -n '4,5s/^# *//p' "$0" >&2
  exit 2
fi
files=("${@:1:4}")
shift 4
for file in "${files[@]}"; do
  if [[ $file != - && ! -f $file ]]; then
    echo "run file $file does not exist" >&2
    exit 2
  fi
done
stages=(sft select rl eval) scripts=(sft_stage.sh annotate.sh rl_stage.sh eval.sh)
before=
for i in 0 1 2 3; do
  [[ ${files[i]} != - ]] || continue
  name=${stages[i]^^}_OPTIONS
  read -ra own <<<"${!name:-}"
  command=(sbatch --parsable --kill-on-invalid-dep=yes ${before:+"--dependency=afterok:$before"})
  command+=(${options[@]+"${options[@]}"} ${own[@]+"${own[@]}"} "$here/${scripts[i]}" "${files[i]}" "$@")
  if [[ $dry_run == yes ]]; then
    printf '%q ' "${command[@]}" && echo
    before="<id of ${stages[i]}>"
    continue
  fi
  # A federated cluster answers "id;cluster".
  before=$("${command[@]}" | cut -d';' -f1)
  echo "${stages[i]} $before"
done
