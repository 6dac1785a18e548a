#!/usr/bin/env bash
# Everything that needs a GPU, in 8 minutes on one of them, with nothing downloaded.
#
#   benchmarks/gpu_suite.sh [RESULTS_DIR]            # default: benchmarks/results/gpu
#   benchmarks/gpu_suite.sh --dry-run [RESULTS_DIR]  # any machine: every stage runs, small, on the tests' second device
#
# Without a GPU it is always a dry run, whose times mean nothing. Each stage has its own time limit and leaves its JSON,
# so a run that is cut short still gives something; the table comes last. STAGES="kernels train-tiny" runs only these.
#
# Wheels that the machine lacks (megatron-core, pydantic, liger-kernel, ...) lie in wheels/ and are installed into
# build/gpu-packages; vLLM and Transformer Engine are not needed. PYTHON picks the interpreter (its torch and triton);
# without it the checkout's own environment is taken where there is one, else python3.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if ! "$python" -c "import torch, triton" 2> /dev/null; then
  echo "$python lacks torch or triton: name an interpreter that has both, PYTHON=/path/to/python $0" >&2
  exit 2
fi
dry=()
if [ "${1:-}" = "--dry-run" ]; then dry=(--dry-run); shift; fi
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then dry=(--dry-run); fi
results="$(realpath -m "${1:-benchmarks/results/gpu}")"
packages="$PWD/build/gpu-packages"
mkdir -p "$results" "$packages"
rm -f "$results"/*.json "$results"/stages.jsonl
if compgen -G "wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" wheels/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$PWD/build/triton-cache" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

step() {  # step NAME SECONDS COMMAND...: go on after a failure, remember it
  local name="$1" limit="$2" started=$SECONDS status
  shift 2
  [ -z "${STAGES:-}" ] || [[ " $STAGES " == *" $name "* ]] || return 0
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@"
  status=$?
  [ "$status" -ne 124 ] || echo "== $name: time is up"
  echo "{\"name\": \"$name\", \"seconds\": $((SECONDS - started)), \"limit\": $limit, \"status\": $status}" \
    >> "$results/stages.jsonl"
}

scale=1; [ ${#dry[@]} -eq 0 ] || scale=10  # a busy CPU: only a hang is cut short
train=("$python" benchmarks/gpu_training.py "${dry[@]}")
mid=mid; [ ${#dry[@]} -eq 0 ] || mid=tiny  # it takes 24 GB, and hours of a CPU without bf16
if [ ${#dry[@]} -eq 0 ]; then
  step build 40 "$python" -m megatron_r1reward.kernels.policy_loss.cuda_cluster
fi
step table $((15 * scale)) "$python" -m megatron_r1reward.kernels.choose_kernel
step kernels $((60 * scale)) "$python" benchmarks/gpu_kernels.py "${dry[@]}" --check --json "$results/kernels.json"
step train-tiny $((45 * scale)) "${train[@]}" --size tiny --json "$results/train-tiny.json"
step train-mid $((75 * scale)) "${train[@]}" --size $mid --check --json "$results/train-mid.json"
step train-shared $((50 * scale)) "${train[@]}" --size tiny --ranks 2 --json "$results/train-shared.json"
step ipc $((25 * scale)) "$python" benchmarks/gpu_ipc_push.py "${dry[@]}" --check --json "$results/ipc.json"
step loss $((110 * scale)) "$python" benchmarks/policy_loss.py --gpu "${dry[@]}" --budget 95 --check \
  --json "$results/loss.json"
step sanitize $((60 * scale)) "$python" benchmarks/gpu_kernels.py "${dry[@]}" --sanitize
"$python" benchmarks/gpu_table.py "$results"
