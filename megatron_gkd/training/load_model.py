"""Load a model and show how far it is."""

from __future__ import annotations

from megatron_gkd.checkpoint_format.weight_files import HEAD
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.mesh import Mesh


def load_model(title: str, checkpoint: Checkpoint, mesh: Mesh, options: BuildOptions) -> MegatronModel:
    """Call ``MegatronModel.load`` as a phase of the start. All ranks of the world must call it.

    `title`: role and name of the model, as in "the student Qwen/Qwen3-1.7B".
    """
    total = _tensors_of_main_rank(checkpoint, mesh)
    with phase(f"Loading {title}", is_main=mesh.is_main, unit="tensors") as shown:
        shown.update(0, total)
        return MegatronModel.load(checkpoint, mesh, options, lambda read: shown.update(read, total))


def _tensors_of_main_rank(checkpoint: Checkpoint, mesh: Mesh) -> int | None:
    """Return how many tensors rank 0 reads a share of; None where it reads some of the layers or experts only."""
    if mesh.layout.pipeline > 1 or (checkpoint.is_moe and mesh.layout.expert > 1):
        return None
    is_tied = checkpoint.config.tie_word_embeddings
    return sum(not (is_tied and name == HEAD) for name in checkpoint.tensors)
