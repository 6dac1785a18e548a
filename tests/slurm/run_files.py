"""The run files of the jobs, and the inputs that they name."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1reward.demo.digits import build_digits
from megatron_r1reward.demo.pipeline import write_demo_model

SFT_STEPS = 30  # until the model answers so that RL has something to do
RESUMED_STEPS = 12  # enough for a life that stops within them, and some steps after it
# A constant schedule: runs of different length take the same steps as far as they go.
SFT_TOML = """
[run]
output_dir = "{folder}/reference"
num_threads = 1
[model]
path = "{folder}/model"
precision = "fp32"
[precision]
deterministic = true
[data]
train = "{folder}/data/sft.jsonl"
token_budget = 2048
[optimizer]
lr = 3e-3
schedule = "constant"
warmup_fraction = 0.0
[sft]
steps = {steps}
global_batch_size = 8
[checkpoint]
save_every = 10
[monitor]
tensorboard = false
[cluster]
ranks_per_node = 1
walltime_margin_s = 15
grace_s = 10
"""
# As above a constant schedule. The stages with servers differ in output, model and data.
RL_TOML = """
[run]
output_dir = "{folder}/{output}"
local_ranks = 4
num_threads = 1
[model]
path = "{folder}/{model}"
precision = "fp32"
[precision]
deterministic = true
[data]
train = "{folder}/data/pool.jsonl"
{select}
token_budget = 2048
[optimizer]
lr = 1e-3
schedule = "constant"
warmup_fraction = 0.0
[rl]
steps = 3
rollout_batch_size = 8
train_batch_size = 8
[algorithm]
entropy_coefficient = 0.01  # a gradient also where all rewards are equal
[sampling]
max_tokens = 24
[rollout]
dtype = "float32"
max_model_len = 512
max_num_seqs = 8
kv_cache_bytes = 67108864
[judge]
model_path = "{folder}/model"
dtype = "float32"
max_model_len = 512
max_num_seqs = 8
kv_cache_bytes = 67108864
max_tokens = 4
retries = 0  # untrained, it gives no verdict, however often it is asked
[annotate]
max_rows = 24
attempts = 2
[evaluation]
data = "{folder}/data/heldout.jsonl"
max_pairs = 2
samples = 1
voting = [1]
[checkpoint]
save_every = 100
[monitor]
tensorboard = false
[cluster]
grace_s = 20
"""
# What the cold start teaches within a few steps: a verdict that can be read and is right half of the time, so that some
# samples are hard, RL has rewards and asks the judge.
RESPONSE = "<think>Response 1 is better.</think><answer>1</answer>"


def write_inputs(folder: Path) -> None:
    """Data, a tiny model, and run files: those of the chain's stages, each of which continues the one before, and
    those that need only the cold start (rl-unselected.toml, serve.toml)."""
    data = folder / "data"
    build_digits(data, seed=0, sft_rows=200, pool_rows=60, heldout_pairs=8, judge_rows=40)
    rows = [json.loads(line) | {"response": RESPONSE} for line in (data / "sft.jsonl").read_text().splitlines()]
    (data / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_demo_model(folder / "model", [data / "sft.jsonl", data / "judge_sft.jsonl"], seed=0)
    select = f'select = "{folder}/annotate/hard.json"'
    texts = {
        "sft": SFT_TOML.format(folder=folder, steps=SFT_STEPS),
        "annotate": RL_TOML.format(folder=folder, output="annotate", model="reference/hf", select=""),
        "rl": RL_TOML.format(folder=folder, output="rl", model="reference/hf", select=select),
        "eval": RL_TOML.format(folder=folder, output="evaluation", model="rl/hf", select=""),
        "serve": RL_TOML.format(folder=folder, output="serve", model="reference/hf", select=""),
        "rl-unselected": RL_TOML.format(folder=folder, output="rl", model="reference/hf", select=""),
    }
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
