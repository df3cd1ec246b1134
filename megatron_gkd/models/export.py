"""Write a Megatron model as a Hugging Face checkpoint that `from_pretrained` opens."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import GenerationConfig

from megatron_gkd.models.megatron_model import MegatronModel


def export_checkpoint(model: MegatronModel, directory: str | Path) -> Path:
    """Weights, config, generation config and tokenizer of `model` into `directory`. A collective over the whole world.

    The checkpoint is written beside its place and moved there when whole, so an interrupted run leaves no half of one.
    """
    directory = Path(directory)
    unfinished = directory.with_name(directory.name + ".unfinished")
    if model.mesh.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    with model.mesh.virtual_stages(model.config.virtual_pipeline_model_parallel_size):
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            model.config.bridge.save_weights(model.chunks, str(unfinished))
    if model.mesh.is_main:
        _write_companions(model, unfinished)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    dist.barrier()
    return directory


def _write_companions(model: MegatronModel, directory: Path) -> None:
    source = model.checkpoint
    config = source.config.__class__.from_pretrained(source.path)
    config.dtype = model.config.params_dtype
    config.save_pretrained(directory)
    if (source.path / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source.path).save_pretrained(directory)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(directory)
    source.tokenizer().save_pretrained(directory)
