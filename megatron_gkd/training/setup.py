"""The start of every command that needs processes: their world, its mesh, the checkpoints, and the rows."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.fp8 import fp8_token_multiple
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.plugins import load_plugins
from megatron_gkd.data.prompt import PromptLimits
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import PAD_TOKEN_ID
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import read_chat_template
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.reporting.logging import log_to_console
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.connection import connect
from megatron_gkd.runtime.current_phase import in_phase
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Layout, Mesh, destroy_mesh, initialize_mesh, set_default_timeout
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.runtime.watchdog.evidence import enable_recording
from megatron_gkd.training.build_teacher import check_tokenizers, open_images, open_teachers, shared_vocab_size_of_all
from megatron_gkd.training.watching import RecordEnd, announced, start_watchdog


@contextlib.contextmanager
def world_of(
    recipe: Recipe, record_end: RecordEnd = lambda code, reason: None, *, needs_plugins: bool = True
) -> Iterator[Mesh]:
    """Connect the processes that the launcher has started, build the recipe's mesh over them, and log to the console.

    Without a launcher the world is this process alone. After an exception the groups stay: NCCL would wait for ranks
    that are still at work. `cli.run` ends the process.

    Args:
        recipe: of the command.
        record_end: called in one rank where the watchdog ends the run.
        needs_plugins: whether to load the plugins; they may register more than what the rows need.
    """
    portability.select_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = recipe.cluster.ddp_timeout
    options: dict[str, Any] = {"backend": portability.backend(), "timeout": datetime.timedelta(seconds=timeout)}
    if "RANK" not in os.environ:
        options |= _world_of_one_process()
    rank = int(os.environ["RANK"])
    enable_recording(Path(recipe.output.output_dir))
    set_default_timeout(timeout)
    with phase(f"Connecting {os.environ['WORLD_SIZE']} processes", is_main=rank == 0):
        connect(**options)
        watchdog = start_watchdog(recipe, record_end)
        layout = Layout.from_section(recipe.parallel, fp8_token_multiple(recipe))
        with announced(watchdog):
            mesh = initialize_mesh(layout, recipe.train.seed, timeout)
    with log_to_console(recipe.output.log_level, recipe.output.log_ranks, rank), announced(watchdog):
        if needs_plugins and recipe.data.external_plugins:
            Nodes.from_world().on_all(lambda: load_plugins(recipe.data.external_plugins))
        yield mesh
    watchdog.close()
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
        students = () if self.images is None else self.images.reserved_ids
        return tuple(sorted({*students, *(id_ for one in self.teachers.values() for id_ in one.reserved_ids)}))


def open_models(recipe: Recipe, mesh: Mesh) -> Models:
    """Open the checkpoints of student and teachers. All ranks must call it.

    Raises:
        UserError: a model is not supported, its tokenizer differs from the student's, or the student reads no images
            and the recipe limits their sizes.
    """
    nodes = Nodes.from_world()
    with (
        in_phase("open_models", is_limited=False),  # a download may take hours
        phase(f"Opening the student {recipe.student.model}", is_main=mesh.is_main),
    ):
        section = recipe.student
        source = ModelSource.of_student(section)
        student = Checkpoint.open(source, nodes, trust_remote_code=section.trust_remote_code)
    images = open_images(recipe, student)
    _check_image_keys(recipe, images)
    tokenizer = _open_tokenizer(student, images)
    with in_phase("open_models", is_limited=False):
        teachers = open_teachers(recipe, nodes)
    check_tokenizers(recipe, tokenizer, teachers, is_main=mesh.is_main)
    return Models(student, teachers, tokenizer, shared_vocab_size_of_all(student, teachers), images)


def _check_image_keys(recipe: Recipe, images: ImageProcessing | None) -> None:
    for name in ("min_pixels", "max_pixels", "max_patches"):
        value = getattr(recipe.data, name)
        if images is None and value is not None:
            raise UserError(f"data.{name} = {value}: the student {recipe.student.model} reads text alone; leave it out")
    limits = recipe.rollout.vllm_limit_mm_per_prompt
    if images is None and limits is not None:
        key = f"rollout.vllm_limit_mm_per_prompt = {limits}"
        raise UserError(f"{key}: the student {recipe.student.model} reads text alone; leave it out")


def open_student(recipe: Recipe) -> Models:
    """Open the student's configuration and tokenizer alone, on this process, without the weights and the teachers.

    Of local teachers whose folders are here the sizes of the vocabulary count, so that rows are those of training.

    Raises:
        UserError: the student is not supported, has no tokenizer, or reads no images and the recipe limits their sizes.
    """
    section = recipe.student
    student = Checkpoint.open_without_weights(
        ModelSource.of_student(section), trust_remote_code=section.trust_remote_code
    )
    images = open_images(recipe, student)
    _check_image_keys(recipe, images)
    sizes = [student.vocab_size]
    for teacher in recipe.teacher.all.values():
        if teacher.source == "local" and teacher.teacher_model and Path(teacher.teacher_model).is_dir():
            with contextlib.suppress(UserError):  # training names what is wrong with a teacher
                sizes.append(Checkpoint.open_configuration(teacher.teacher_model).vocab_size)
    return Models(student, {}, _open_tokenizer(student, images), min(sizes), images)


def _open_tokenizer(student: Checkpoint, images: ImageProcessing | None) -> PreTrainedTokenizerBase:
    tokenizer = student.tokenizer()
    if images is not None and (template := read_chat_template(student.path)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def open_rows(
    recipe: Recipe, models: Models, split: Literal["train", "validation"], *, all_completed: bool | None = None
) -> tuple[TokenizedDataset, DataReport]:
    """Return the rows of a split as the student's tokens.

    Args:
        recipe: its rows of "train" leave room for a completion where lmbda > 0.
        models: their tokenizer and vocabulary.
        split: the rows to read.
        all_completed: whether a model completes each row of "train", which may be a prompt alone; None: as the
            recipe says.
    """
    options = row_options(recipe, models, split, all_completed=all_completed)
    # Reading and tokenizing may take hours, as may waiting for another run that does; `Nodes` finds ranks that stop.
    with in_phase("open_rows", is_limited=False):
        return build_dataset(recipe.data, split, models.tokenizer, options, nodes=Nodes.from_world())


def row_options(
    recipe: Recipe, models: Models, split: Literal["train", "validation"], *, all_completed: bool | None = None
) -> RowOptions:
    """Return what a run requires of the rows of a split. The arguments are those of `open_rows`."""
    lmbda, is_training = recipe.distill.lmbda, split == "train"
    all_completed = lmbda == 1 if all_completed is None else all_completed
    takes_prompts = all_completed or (lmbda > 0 and recipe.data.prompt_only == "on_policy_only")
    is_completed = is_training and (all_completed or lmbda > 0)
    return RowOptions(
        allows_prompts=is_training and takes_prompts,
        skips_prompts=takes_prompts and not is_training,
        has_unused_responses=is_training and all_completed,
        prompt_limits=PromptLimits.from_recipe(recipe) if is_completed else None,
        tag_key=recipe.teacher.teacher_tag_key,
        vocab_size=models.vocab_size,
        seed=recipe.train.seed,
        use_hf=recipe.student.use_hf,
        images=models.images,
    )


def pad_token_id(models: Models) -> int:
    """Return the tokenizer's padding id, or 0 where it has none that all models can read; its content has no effect."""
    found = models.tokenizer.pad_token_id
    return PAD_TOKEN_ID if found is None or found >= models.vocab_size else found
