"""The command that exports a training checkpoint as a Hugging Face folder, under any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.stages import Stages
from megatron_gkd.errors import RunStopped
from megatron_gkd.models.adapter_export import export_adapters
from megatron_gkd.models.build_options import BuildOptions
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.export import export_checkpoint
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime.agreement import raise_together
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.training.checkpointing.loader import load_model, verify
from megatron_gkd.training.model_options import DTYPES, lora_options
from megatron_gkd.training.setup import world_of


def export(recipe: Recipe, path: Path, output: Path, *, has_adapters: bool = False) -> None:
    """Write the student of the checkpoint at `path` into `output`, in the world that torchrun describes.

    Args:
        recipe: the run's recipe, with the layout to build the student under, which may be another than the run's.
        path: the checkpoint.
        output: the new folder.
        has_adapters: write the adapters alone, in PEFT's format; by default they are merged, where there are any.
    """
    with world_of(recipe, needs_plugins=False) as mesh:
        export_student(recipe, mesh, path, output, has_adapters=has_adapters)
        if mesh.is_main:
            kind = " (PEFT adapters)" if has_adapters else " (adapters merged)" if recipe.lora is not None else ""
            print(f"exported {path} to {output}{kind}", flush=True)


def export_student(recipe: Recipe, mesh: Mesh, path: Path, output: Path, *, has_adapters: bool = False) -> None:
    """Build the student alone, load its weights and write them as `export` does. All ranks must call it.

    Raises:
        RunStopped: in all ranks; the checkpoint is damaged, or its model is not the recipe's.
        UserError: in all ranks; the folder can't be written.
    """
    raise_together(verify(path), RunStopped)
    lora = None if recipe.lora is None else replace(lora_options(recipe.lora, recipe.train), adapters=None)
    options = BuildOptions(
        dtype=DTYPES[recipe.train.dtype],
        virtual_pipeline=recipe.parallel.virtual_pipeline_model_parallel_size,
        stages=Stages.of_student(recipe.parallel),
        lora=lora,
    )
    section = recipe.student
    source, is_trusted = ModelSource.of_student(section), section.trust_remote_code
    checkpoint = Checkpoint.open(source, Nodes.from_world(), trust_remote_code=is_trusted)
    model = MegatronModel.load(checkpoint, mesh, options, needs_weights=lora is not None)
    load_model(model, path)
    if has_adapters:
        export_adapters(model, output)
    else:
        export_checkpoint(model, output)
