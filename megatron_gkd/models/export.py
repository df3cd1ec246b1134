"""Write a Megatron model as a Hugging Face checkpoint that `from_pretrained` opens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import publish
from megatron_gkd.runtime.quiet import hidden_stderr

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""The files of a multimodal model's processor beside those of its tokenizer."""


def export_checkpoint(model: MegatronModel, directory: str | Path) -> Path:
    """Write weights, config, generation config, tokenizer and processor of `model`. All ranks must call it.

    Adapters are merged into their layers. The checkpoint is written beside `directory`, which it replaces when all of
    it is there, so that an interrupted run leaves no incomplete one.

    Raises:
        UserError: in all ranks; the folder or a file beside the weights can't be written.
    """
    directory = Path(directory)
    unfinished = directory.with_name(directory.name + ".unfinished")

    def prepare() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        write_companions(model.checkpoint, model.config.params_dtype, unfinished)
        publish(unfinished, directory, remove=shutil.rmtree)

    run_on_main(prepare, os_error=f"{directory}: can't be written to")
    with model.exporting() as bridge, hidden_stderr():
        bridge.save_weights(model.chunks, str(unfinished))
    run_on_main(finish, os_error=f"{directory}: can't be written to")
    return directory


def try_companions(checkpoint: Checkpoint, dtype: torch.dtype, folder: Path) -> None:
    """Write all files of an export but the weights, once, and delete them. All ranks of the world must call it.

    Args:
        checkpoint: the student's initial checkpoint.
        dtype: dtype of the student's weights.
        folder: the folder of the run's exports.

    Raises:
        UserError: in all ranks; one of the files can't be written.
    """

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hf-trial.", dir=folder) as trial:
            write_companions(checkpoint, dtype, Path(trial))

    run_on_main(write, os_error=f"output.output_dir = {folder}: no export can be written there")


def write_companions(checkpoint: Checkpoint, dtype: torch.dtype, directory: Path) -> None:
    """Write config, generation config, tokenizer and processor of `checkpoint`, for weights of `dtype`.

    The processor's files are copied as they are: image processors may need libraries that are not installed.

    Raises:
        UserError: transformers refuses to write one of them. (A folder that can't be written to is an OSError.)
    """

    def write_config() -> None:
        config = checkpoint.config.__class__.from_pretrained(checkpoint.path)
        for part in (config, *(getattr(config, name) for name in config.sub_configs if hasattr(config, name))):
            part.dtype = dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights were dequantized when they were read
        config.save_pretrained(directory)
        if hasattr(config, "auto_map"):  # which names classes in these files
            for file in checkpoint.path.glob("*.py"):
                shutil.copyfile(file, directory / file.name)

    def write_generation_config() -> None:
        own = checkpoint.path / GENERATION_CONFIG_NAME
        if own.exists():  # as it is: transformers refuses to save some that it reads
            shutil.copyfile(own, directory / GENERATION_CONFIG_NAME)
        else:
            GenerationConfig.from_model_config(checkpoint.config).save_pretrained(directory)

    _attempt(write_config, f"{checkpoint.path}/config.json")
    _attempt(write_generation_config, f"{checkpoint.path}/{GENERATION_CONFIG_NAME}")
    write_tokenizer(checkpoint, directory)
    if checkpoint.has_images:
        _copy_processor(checkpoint.path, directory)


def _copy_processor(folder: Path, directory: Path) -> None:
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)


def write_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the tokenizer of `checkpoint` into `directory`; raise like `write_companions`."""
    _attempt(lambda: checkpoint.tokenizer().save_pretrained(directory), f"the tokenizer in {checkpoint.path}")


def _attempt(write: Callable[[], object], name: str) -> None:
    try:
        write()
    except (OSError, UserError):
        raise
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name}: transformers can't write it into an export ({reason})") from error
