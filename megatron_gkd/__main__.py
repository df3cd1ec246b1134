"""`python -m megatron_gkd` is the console command `megatron-gkd`."""

import sys

from megatron_gkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
