"""Convert, inspect and verify checkpoints: the same commands as `r1reward convert`."""

from megatron_r1reward.conversion.convert_commands import app
from megatron_r1reward.processes import run_program

if __name__ == "__main__":
    run_program(app)
