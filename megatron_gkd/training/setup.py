"""The start of every command that needs processes: their world, its mesh, the checkpoints, and the rows."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.dataset import TokenizedDataset, build_dataset
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import PAD_TOKEN_ID
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import open_processing, read_chat_template
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.reporting.logging import log_to_console
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout, Mesh, destroy_mesh, initialize_mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.training.build import prompt_limits
from megatron_gkd.training.build_teacher import open_images, open_teachers, shared_vocab_size_of_all


@contextlib.contextmanager
def world_of(recipe: Recipe) -> Iterator[Mesh]:
    """Connect the processes that the launcher has started, build the recipe's mesh over them, and log to the console.

    Without a launcher the world is this process alone. After an exception the groups stay: NCCL would wait for ranks
    that are still at work. `cli.run` ends the process.
    """
    portability.select_device(int(os.environ.get("LOCAL_RANK", "0")))
    options: dict[str, Any] = {"backend": portability.backend(), "timeout": datetime.timedelta(minutes=30)}
    if "RANK" not in os.environ:
        options |= _world_of_one_process()
    rank = int(os.environ["RANK"])
    with phase(f"Connecting {os.environ['WORLD_SIZE']} processes", is_main=rank == 0):
        dist.init_process_group(**options)
        mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    with log_to_console(recipe.output.log_level, recipe.output.log_ranks, rank):
        yield mesh
    destroy_mesh()
    dist.destroy_process_group()


def _world_of_one_process() -> dict[str, Any]:
    """Return the arguments of a process group at a free port: another run on the host may have a fixed one."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    os.environ.update({name: str(value) for name, value in alone.items()})  # libraries read them
    return {"store": store, "rank": 0, "world_size": 1}


@dataclass(frozen=True)
class Models:
    """The recipe's checkpoints, on every rank's disk.

    Attributes:
        student: the student's checkpoint.
        teachers: the local teachers' checkpoints, by their keys in the recipe.
        tokenizer: the student's tokenizer.
        vocab_size: number of ids that all of them have logits for.
        images: what the student's processor makes of images; None where it reads text alone.
    """

    student: Checkpoint
    teachers: dict[str, Checkpoint]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    images: ImageProcessing | None = None

    def find_reserved_ids(self) -> tuple[int, ...]:
        """Return the ids that are never sampled: they would count as images for the student or a local teacher."""
        opened = [open_processing(teacher.path) for teacher in self.teachers.values() if teacher.has_images]
        return tuple(sorted({id_ for one in (self.images, *opened) if one is not None for id_ in one.reserved_ids}))


def open_models(recipe: Recipe, mesh: Mesh) -> Models:
    """Open the checkpoints of student and teachers. All ranks must call it.

    Raises:
        UserError: a model is not supported, its tokenizer differs from the student's, or the student reads no images
            and the recipe limits their sizes.
    """
    nodes = Nodes.from_world()
    with phase(f"Opening the student {recipe.student.model}", is_main=mesh.is_main):
        section = recipe.student
        student = Checkpoint.open(section.model, nodes, trust_remote_code=section.trust_remote_code)
    images = open_images(recipe, student)
    _check_image_keys(recipe, images)
    tokenizer = student.tokenizer()
    if images is not None and (template := read_chat_template(student.path)) is not None:
        tokenizer.chat_template = template
    teachers = open_teachers(recipe.teacher, nodes)
    return Models(student, teachers, tokenizer, shared_vocab_size_of_all(student, teachers), images)


def _check_image_keys(recipe: Recipe, images: ImageProcessing | None) -> None:
    for name in ("min_pixels", "max_pixels", "max_patches"):
        value = getattr(recipe.data, name)
        if images is None and value is not None:
            raise UserError(f"data.{name} = {value}: the student {recipe.student.model} reads text alone; leave it out")


def open_rows(
    recipe: Recipe, models: Models, split: Literal["train", "validation"], *, prompts: bool = False
) -> tuple[TokenizedDataset, DataReport]:
    """Return the rows of a split as the student's tokens.

    Args:
        recipe: its rows of "train" leave room for a completion where lmbda > 0.
        models: their tokenizer and vocabulary.
        split: the rows to read.
        prompts: whether rows of "train" may be prompts alone, for a model to complete.
    """
    is_completed = split == "train" and (prompts or recipe.distill.lmbda > 0)
    return build_dataset(
        recipe.data,
        split,
        models.tokenizer,
        RowOptions(
            allows_prompts=prompts,
            prompt_limits=prompt_limits(recipe) if is_completed else None,
            tag_key=recipe.teacher.teacher_tag_key,
            vocab_size=models.vocab_size,
            images=models.images,
        ),
        nodes=Nodes.from_world(),
    )


def pad_token_id(models: Models) -> int:
    """Return the tokenizer's padding id, or 0 where it has none that all models can read; its content has no effect."""
    found = models.tokenizer.pad_token_id
    return PAD_TOKEN_ID if found is None or found >= models.vocab_size else found
