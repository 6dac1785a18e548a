# Two commands are enough: `make demo` and `make test`. Both build the environment in .venv when it is missing.
# The first of the supported ones that is there and starts.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; done || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
# What the environment depends on; the stamp makes a second call cost nothing.
STAMP := $(VENV)/.ready

.PHONY: setup setup-dry-run recipes peers demo test test-fast test-slurm bench lint lock docs format clean

setup: $(STAMP)

# Options of tools/environment.py, which knows where packages come from; --locked: exactly constraints/cpu.txt,
# e.g. make setup SETUP=--locked.
SETUP ?=

$(STAMP): pyproject.toml tools/environment.py megatron_r1reward/torchvision_cpu.py
	$(PYTHON) tools/environment.py build cpu $(VENV) $(SETUP)
	touch $@

# What `make setup` would do here, and which index it would take.
setup-dry-run:
	@$(PYTHON) tools/environment.py build cpu $(VENV) --dry-run

# The launcher environment of recipes/*.py. NeMo-Run's pins contradict vLLM's, so it is not part of .venv.
RECIPES := .venv-recipes
recipes: $(RECIPES)/.ready

$(RECIPES)/.ready: pyproject.toml tools/environment.py
	$(PYTHON) tools/environment.py build recipes $(RECIPES)
	touch $@

# A second Triton, for the test that the kernels compile on it, too: the version that torch 2.11 brings.
TRITON_36 := build/triton-3.6.0
$(TRITON_36)/.ready: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TRITON_36) triton==3.6.0
	touch $@

# Other programs whose own code the tests of the reward service run. Without their dependencies: they ask for other
# versions of what is there.
PEERS := $(VENV)/.peers
peers: $(PEERS)

$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet --no-deps "trl>=1.16,<2" "accelerate>=1.10" "verl==0.9.1"
	-$(BIN)/pip install --quiet --no-deps "openrlhf==0.11.2"
	touch $@

demo: $(STAMP)
	$(BIN)/r1reward demo --out runs/demo

# Tests of the recipes, a second Triton, other trainers, Slurm and a browser are skipped, and say so, where these cannot
# be installed.
test: $(STAMP)
	-@$(MAKE) --no-print-directory recipes
	-@$(MAKE) --no-print-directory $(TRITON_36)/.ready
	-@$(MAKE) --no-print-directory peers
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
	$(BIN)/python benchmarks/step_idle.py --json $(RESULTS)/step_idle.json
	$(BIN)/pip install --quiet --no-deps "trl>=1.16,<2" "accelerate>=1.10" "liger-kernel==0.8.5" "imagehash>=4.3" pywavelets
	$(BIN)/python benchmarks/rl_update_vs_trl.py --json $(RESULTS)/rl_update_vs_trl.json
	for family in qwen2_5_vl qwen3_vl qwen3_vl_moe; do $(BIN)/python benchmarks/parallel_parity.py \
		--family $$family --json $(RESULTS)/parallel_parity_$$family.json; done
	$(BIN)/python benchmarks/planner_error.py --json $(RESULTS)/planner_error.json
	$(BIN)/python benchmarks/asynchrony.py --json $(RESULTS)/asynchrony.json # on a finished `make demo`
	$(BIN)/python benchmarks/weight_push.py --json $(RESULTS)/weight_push.json
	$(BIN)/python benchmarks/rollout.py --json $(RESULTS)/rollout.json
	$(BIN)/python benchmarks/conversion.py --json $(RESULTS)/conversion.json
	$(BIN)/python benchmarks/data_pipeline.py --json $(RESULTS)/data_pipeline.json # 200,000 rows
	$(BIN)/python benchmarks/picture_hashes.py --json $(RESULTS)/picture_hashes.json
	$(BIN)/python benchmarks/ranking.py --json $(RESULTS)/ranking.json # on a finished `make demo`
	$(BIN)/python benchmarks/serving_throughput.py --json $(RESULTS)/serving_throughput.json # on a finished `make demo`
	$(BIN)/python benchmarks/reward_kinds.py --json $(RESULTS)/reward_kinds.json # on a finished `make demo` and `rm`
	$(BIN)/python benchmarks/methods_resume.py --json $(RESULTS)/methods_resume.json # on a finished `make demo`
	$(BIN)/python benchmarks/stability.py --json $(RESULTS)/stability.json --pictures $(RESULTS) # on a finished `make demo`; half an hour of one core, resumes

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/environment.py check

# constraints/*.txt anew, from what the registries have today; needs uv.
lock: $(STAMP)
	$(BIN)/python tools/environment.py lock

# The documentation as a site, in build/site; an unknown link or reference is an error.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(RECIPES) runs build *.egg-info
