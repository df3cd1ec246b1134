"""`cluster.ddp_timeout` is that of every process group: the default one, Megatron's, and those that libraries add."""

import datetime

import torch
import torch.distributed as dist

from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh, set_default_timeout

SECONDS = 1234.5


def timeouts(rank, world_size):
    """Return the names of Megatron's and a further group's time-outs, in seconds."""
    from torch.distributed import distributed_c10d

    before = distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout
    set_default_timeout(SECONDS)
    mesh = initialize_mesh(Layout(tensor=2), seed=0, timeout=SECONDS)
    added = dist.new_group([0, 1])
    groups = {name: getattr(mesh, name) for name in ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expert_dp")}
    found = {
        name: group._get_backend(torch.device("cpu")).options._timeout / datetime.timedelta(seconds=1)
        for name, group in (groups | {"added": added}).items()
    }
    destroy_mesh()
    dist.destroy_process_group(added)
    distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = before
    return found


def test_all_groups_have_the_time_out_of_the_recipe(gloo_world):
    for found in gloo_world(2).run(timeouts):
        assert set(found.values()) == {SECONDS} and len(found) == 8
