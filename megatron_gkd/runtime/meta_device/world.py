"""A process group of any size, of which this process is one rank and the other ranks do not exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime.mesh import Layout, Mesh, destroy_mesh, initialize_mesh


class FakeMesh(Mesh):
    """The mesh of a rank that is none, which writes and prints nothing."""

    @property
    def is_main(self) -> bool:
        """See `Mesh.is_main`."""
        return False


@contextlib.contextmanager
def fake_world(layout: Layout, world_size: int, rank: int) -> Iterator[Mesh]:
    """Be a rank of a world inside.

    Args:
        layout: of the ranks.
        world_size: number of ranks.
        rank: of this process.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield FakeMesh(**vars(initialize_mesh(layout, seed=0)))
    finally:
        destroy_mesh()
        dist.destroy_process_group()
