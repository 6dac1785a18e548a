#!/usr/bin/env bash
# Everything that needs a GPU, nothing downloaded: build, correctness, race check, benchmark of the kernels (8 minutes),
# and 50 steps of a mid-size model in bf16 and FP8 under Transformer Engine (10 minutes at most).
#
#   benchmarks/gpu_suite.sh [RESULTS_DIR]
#   benchmarks/gpu_suite.sh --dry-run     # any machine: every command is found and starts, nothing is measured
#
# Wheels that the machine lacks (liger-kernel, megatron-core, pydantic, pytest, ...) lie in wheels/ and are installed
# into build/gpu-packages. PYTHON picks the interpreter (its torch, triton and nvcc are used).
set -euo pipefail
cd "$(dirname "$0")/.."
dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=1
  shift
fi
results="$(realpath -m "${1:-benchmarks/results}")"
python="${PYTHON:-python3}"
packages="$PWD/build/gpu-packages"
[ -n "$dry_run" ] || mkdir -p "$results" "$packages"
if [ -z "$dry_run" ] && compgen -G "wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" wheels/*.whl
fi
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$PWD/build/triton-cache"

status=0
step() {  # step SECONDS NAME COMMAND...: go on after a failure, remember it
  local limit="$1" name="$2"
  shift 2
  echo "== $name"
  if [ -n "$dry_run" ]; then
    echo "$*"
    return
  fi
  timeout "$limit" "$@" || { echo "== $name FAILED ($?)"; status=1; }
}
step 60 "build the CUDA kernel" "$python" -m megatron_r1reward.kernels.build
step 10 "dispatch table" "$python" -m megatron_r1reward.kernels.choose_kernel
step 120 "correctness and races" "$python" -m pytest -q -m gpu tests/gpu/test_policy_loss_gpu.py
step 280 "benchmark" "$python" benchmarks/policy_loss.py --gpu --budget 240 --check --json "$results/policy_loss_gpu.json"
step 600 "bf16 and FP8 training" "$python" benchmarks/precision_training.py --check --json "$results/precision_training.json"
if [ -n "$dry_run" ]; then
  "$python" -m megatron_r1reward.kernels.choose_kernel > /dev/null || status=1
  "$python" -m pytest -q --collect-only -m gpu tests/gpu/test_policy_loss_gpu.py || status=1
  "$python" benchmarks/policy_loss.py --help > /dev/null || status=1
  "$python" -c "import megatron_r1reward.kernels.build" || status=1
  "$python" benchmarks/precision_training.py --dry-run || status=1
fi
exit "$status"
