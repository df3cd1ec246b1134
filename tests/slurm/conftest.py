"""The tests on a cluster need the one that scripts/test_slurm.sh starts."""

import os

collect_ignore = [] if os.environ.get("MEGATRON_GKD_SLURM_CLUSTER") else ["test_on_a_cluster.py"]
