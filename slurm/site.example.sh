# Copy to slurm/site.sh and edit: the one place for what is special about your cluster. Never committed.
# Sourced twice: on the login node by `slurm/<stage>.sh` and slurm/pipeline.sh, and in every job.
# shellcheck shell=bash disable=SC2034

# Defaults of sbatch (any SBATCH_* input variable); options on the command line win over them.
#export SBATCH_ACCOUNT=my-account
#export SBATCH_PARTITION=gpu
#export SBATCH_GPUS_PER_NODE=4

# The interpreter that runs the supervisor on the nodes (3.11 or later, with pydantic and typer).
#R1REWARD_PYTHON=/shared/r1reward/.venv/bin/python

# Containers (pyxis): every component runs in the image; the supervisor stays on the node, where Slurm's commands are.
#R1REWARD_CONTAINER=/shared/images/r1reward.sqsh
#R1REWARD_MOUNTS=/shared/models:/shared/models,/shared/data:/shared/data

# More sbatch options per stage of slurm/pipeline.sh.
#SFT_OPTIONS="--nodes=2"
#SELECT_OPTIONS="--nodes=1"
#RL_OPTIONS="--nodes=4"
#EVAL_OPTIONS="--nodes=1"

# Modules and network.
#module load cuda
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
