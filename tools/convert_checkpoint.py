"""Convert, inspect and verify checkpoints: the same commands as `r1reward convert`."""

from megatron_r1reward.conversion.convert_commands import app
from megatron_r1reward.processes import on_one_stack, quick_exit

if __name__ == "__main__":
    with quick_exit():
        on_one_stack(app)
