"""The size of what a run keeps on disk, from the headers of the student's files."""

from __future__ import annotations

from pathlib import Path

from megatron_gkd.checkpoint_format.config_file import CheckpointProblem, is_tied, read_config
from megatron_gkd.checkpoint_format.weight_files import count_parameters, read_tensors
from megatron_gkd.config.schema import Recipe

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_MOMENT_BYTES = 8  # two moments in fp32
_MASTER_BYTES = {"bf16": 4, "fp32": 0}


def estimate_bytes(recipe: Recipe) -> int | None:
    """Return the bytes of a run's checkpoints and last export; None where the student's files are not here.

    Runs with adapters, whose checkpoints are small, count their export alone.
    """
    folder = Path(recipe.student.model)
    if not folder.is_dir():
        return None
    try:
        config = read_config(folder)
        numbers = count_parameters(read_tensors(folder, config), is_tied=is_tied(config))
    except (CheckpointProblem, OSError, ValueError, KeyError):  # the recipe's own check reports it
        return None
    dtype = recipe.train.dtype
    export = numbers * _WEIGHT_BYTES[dtype]
    if recipe.output.save_interval is None or recipe.lora is not None:
        return export
    # One more than are kept is written before the oldest goes; the best is kept beside them.
    kept = (recipe.output.save_total_limit or 1) + 2
    optimizer = numbers * (_MOMENT_BYTES + _MASTER_BYTES[dtype]) if recipe.output.save_optim else 0
    return export + kept * (export + optimizer)
