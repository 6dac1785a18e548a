"""Convert, inspect and verify checkpoints: the same commands as `r1reward convert`."""

from megatron_r1reward.cli_convert import app

if __name__ == "__main__":
    app()
