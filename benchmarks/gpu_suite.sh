#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes, nothing downloaded: build, correctness, race check, benchmark.
#
#   benchmarks/gpu_suite.sh [RESULTS_DIR]
#
# Wheels that the machine lacks (liger-kernel, megatron-core, pydantic, pytest, ...) lie in wheels/ and are installed
# into build/gpu-packages. PYTHON picks the interpreter (its torch, triton and nvcc are used).
set -euo pipefail
cd "$(dirname "$0")/.."
results="$(realpath -m "${1:-benchmarks/results}")"
python="${PYTHON:-python3}"
packages="$PWD/build/gpu-packages"
mkdir -p "$results" "$packages"
if compgen -G "wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" wheels/*.whl
fi
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$PWD/build/triton-cache"

status=0
step() {  # step SECONDS NAME COMMAND...: go on after a failure, remember it
  local limit="$1" name="$2"
  shift 2
  echo "== $name"
  timeout "$limit" "$@" || { echo "== $name FAILED ($?)"; status=1; }
}
step 60 "build the CUDA kernel" "$python" -m megatron_r1reward.kernels.build
step 10 "dispatch table" "$python" -m megatron_r1reward.kernels.dispatch
step 120 "correctness and races" "$python" -m pytest -q -m gpu tests/gpu/test_policy_loss_gpu.py
step 280 "benchmark" "$python" benchmarks/policy_loss.py --gpu --budget 240 --check --json "$results/policy_loss_gpu.json"
exit "$status"
