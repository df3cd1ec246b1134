"""`python -m megatron_gkd` is the console command `megatron-gkd`."""

from megatron_gkd.cli import run

if __name__ == "__main__":
    run()
