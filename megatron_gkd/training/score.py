"""The command that writes the teacher's log-probabilities of each row into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.config.schema import OneTeacher, Recipe
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.data.loader import SampleDataset, padding_sample
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.order import PADDING_ROW
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.comparison import hash_processing
from megatron_gkd.errors import UserError
from megatron_gkd.models.token_bytes import TokenBytes
from megatron_gkd.reporting.progress import Progress
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.runtime.shared_folders import require_shared
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.teachers.cache.entries import build_cached_rows
from megatron_gkd.teachers.cache.keys import dataset_keys
from megatron_gkd.teachers.cache.shards import CachedRow, write_shard
from megatron_gkd.teachers.cache.writer import open_for_writing, plan_shards, require_consistent_tags
from megatron_gkd.training.build_teacher import build_teacher
from megatron_gkd.training.setup import Models, open_models, open_rows, pad_token_id, world_of
from megatron_gkd.training.teacher_rows import check_rows, has_images, require_readers_of_videos


def score(recipe: Recipe, output: str, shard_rows: int) -> None:
    """Write the cache of the recipe's data sets into the folder `output`, or the rows that are missing there.

    Every process must see the folder. Each data-parallel replica writes its own files, of at most `shard_rows` rows.
    Which rows are scored together, and so every bit, depends on the data, the recipe and `shard_rows` alone. (Replicas
    that share experts also compute some rows together with those of other replicas.)
    """
    with world_of(recipe) as mesh:
        models = open_models(recipe, mesh)
        datasets = [open_rows(recipe, models, "train", all_completed=False)[0]]
        if recipe.data.has_validation:
            datasets.append(open_rows(recipe, models, "validation")[0])
        rows = _ConcatenatedRows(datasets)
        for dataset in datasets:
            check_rows(recipe.teacher, dataset, models.teachers)
            require_readers_of_videos(recipe, dataset)
        with_images = any(map(has_images, datasets))
        teacher = build_teacher(recipe, mesh, models.student, models.teachers, has_images=with_images)
        if teacher is None:
            raise UserError("teacher.teacher_kind = none: there is no teacher whose scores a cache could hold")
        scorer = Scorer(recipe, mesh, rows, teacher, manifest_of(recipe, models), pad_token_id(models))
        require_shared("--output", Path(output).expanduser(), Nodes.from_world())
        write_cache(Path(output).expanduser(), scorer, shard_rows)


def write_cache(folder: Path, scorer: Scorer, shard_rows: int) -> None:
    """Write the scorer's rows that are missing in `folder`. All ranks must call it."""
    rows, manifest, mesh = scorer.rows, scorer.manifest, scorer.mesh
    cache = open_for_writing(folder, manifest)
    keys = dataset_keys(rows)
    if scorer.recipe.teacher.teachers:
        require_consistent_tags(keys, [rows[row].tag for row in range(len(rows))])
    shards = plan_shards(keys, rows.num_labels, cache, shard_rows=shard_rows, k=manifest.k)
    done, total = len(cache), len(cache) + sum(map(len, shards))
    with Progress(total, mesh.is_main, description="scoring", unit="row") as progress:
        for first in range(0, len(shards), mesh.dp.size()):
            next_shards = shards[first : first + mesh.dp.size()]
            _write(folder, manifest, keys, scorer.score(next_shards))
            done += sum(map(len, next_shards))
            progress.update(done, {})
        progress.message(f"teacher cache {folder}: {total} rows, the {manifest.k} most likely tokens of each label")


def manifest_of(recipe: Recipe, models: Models) -> Manifest:
    """Return the manifest of the cache that `recipe` describes."""
    if recipe.distill.gkd_logits_topk is None:
        raise UserError("distill.gkd_logits_topk = null: must be the number of tokens that a cache holds of each label")
    teachers = recipe.teacher.all.values()
    named = [(_model_of(one, recipe), one.teacher_adapters, *one.teacher_model_server) for one in teachers]
    names = [name for one in named for name in one if name]
    # A server returns log-probabilities at temperature 1, from which the tail at another can't be computed.
    is_served = any(teacher.source == "server" for teacher in teachers)
    images = models.images
    return Manifest(
        k=recipe.distill.gkd_logits_topk,
        temperature=1.0 if is_served else recipe.distill.temperature,
        tokenizer=hash_tokenizer(models.tokenizer),
        teacher=", ".join(names),
        vocab_size=models.vocab_size,
        images=None if images is None else hash_processing(images),
        vocabulary=TokenBytes.from_tokenizer(models.tokenizer).digest(),
    )


def _model_of(teacher: OneTeacher, recipe: Recipe) -> str | None:
    """Return the name of a teacher's model with its revision; None for a teacher without one."""
    if teacher.teacher_model is None:
        return None
    is_student = teacher.source == "self"
    source = ModelSource.of_teacher(teacher, teacher.teacher_model, recipe.student)
    return str(ModelSource.of_student(recipe.student) if is_student else source)


def _write(folder: Path, manifest: Manifest, keys: np.ndarray, scored: dict[int, CachedRow]) -> None:
    def write() -> None:
        if scored:
            write_shard(folder, manifest, keys[list(scored)], list(scored.values()))

    run_on_all(write, os_error=f"{folder}: can't be written to")


class _ConcatenatedRows:
    """Data sets one after the other, with one numbering of all rows."""

    def __init__(self, datasets: Sequence[SampleDataset]) -> None:
        self._datasets = datasets
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self.lengths = np.concatenate([dataset.lengths for dataset in datasets])
        self.num_labels = np.concatenate([dataset.num_labels for dataset in datasets])
        self.num_patches = np.concatenate([dataset.num_patches for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Sample:
        which = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return replace(self._datasets[which][row - start], row_id=int(row))


class Scorer:
    """Score shards of rows; the rank of each replica that writes gets their entries.

    Args:
        recipe: of the command.
        mesh: of the teacher.
        rows: their numbers are their `row_id`.
        teacher: scores the rows.
        manifest: of the cache.
        pad_token_id: id of padding.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        rows: SampleDataset,
        teacher: TeacherSource,
        manifest: Manifest,
        pad_token_id: int,
    ) -> None:
        self.recipe, self.mesh, self.rows, self.manifest, self.teacher = recipe, mesh, rows, manifest, teacher
        self.chunk_tokens = recipe.distill.loss_chunk_tokens
        self.pad_token_id = pad_token_id
        config = BatchConfig.from_recipe(recipe, mesh, pad_token_id)  # the teacher decodes the images that it reads
        self.rows_of_call = config.global_batch_size // mesh.dp.size()  # as many as train would hold at once
        self.planner = MicrobatchPlanner(
            replace(config, dp_rank=0, dp_size=1, microbatch_multiple=1, equal_lengths=False)
        )

    @torch.no_grad()
    def score(self, shards: Sequence[np.ndarray]) -> dict[int, CachedRow]:
        """Return the entries of this replica's shard by row number, in order. All ranks must call it together.

        `shards`: row numbers, at most one shard for each replica.
        """
        number = self.mesh.dp.rank()
        mine = shards[number].tolist() if number < len(shards) else []
        entries: dict[int, CachedRow] = {}
        with self.teacher.resident():
            # All replicas make as many calls, and as many forward passes in each: they may share experts.
            for start in range(0, max(map(len, shards)), self.rows_of_call):
                entries |= self._score_batch(mine[start : start + self.rows_of_call])
        return {row: entries[row] for row in mine} if entries else {}

    def _score_batch(self, rows: list[int]) -> dict[int, CachedRow]:
        microbatches = list(self._microbatches(rows))
        signals = self.teacher.score(microbatches)
        if not self.mesh.is_last_stage:
            return {}
        found: dict[int, CachedRow] = {}
        for microbatch, signal in zip(microbatches, signals, strict=True):
            if signal is None:
                raise ValueError("the last pipeline stage has no signal for a microbatch")
            entries = build_cached_rows(signal, microbatch, self.manifest, self.mesh, self.chunk_tokens)
            if entries is not None:
                found |= zip((sample.row_id for sample in microbatch.samples), entries, strict=True)
        return found

    def _microbatches(self, rows: list[int]) -> Iterator[Microbatch]:
        size = self.planner.config.micro_batch_size
        fill = -len(rows) % size if rows else size
        filled = [*rows, *[PADDING_ROW] * fill]
        microbatches = self.planner.make_microbatches(
            [1 if row == PADDING_ROW else int(self.rows.lengths[row]) for row in filled],
            lambda i: self._sample(filled[i]),
            self._patches(filled),
        )
        most = torch.tensor([len(microbatches)], device=portability.device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.mesh.dp)
        yield from (microbatch.to(portability.device()) for microbatch in microbatches)
        for _ in range(int(most) - len(microbatches)):
            (empty,) = self.planner.make_microbatches([1] * size, lambda _: self._sample(PADDING_ROW))
            yield empty.to(portability.device())

    def _patches(self, rows: Sequence[int]) -> list[int]:
        """Return the patches of each row's images; nothing where they are not limited."""
        if self.planner.config.max_patches is None:
            return []
        return [0 if row == PADDING_ROW else int(self.rows.num_patches[row]) for row in rows]

    def _sample(self, row: int) -> Sample:
        return padding_sample(self.pad_token_id) if row == PADDING_ROW else self.rows[row]
