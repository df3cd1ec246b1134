"""Small random models and rows for runs of a few steps, without files of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.microbatch import Microbatch, collate, shard_context_parallel
from megatron_gkd.data.sample import Sample
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout, Mesh, initialize_mesh
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.training.batches import TrainingData
from megatron_gkd.training.build import build_student
from megatron_gkd.training.build_teacher import build_teacher
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.student import Student
from megatron_gkd.training.trainer import RunOutput, Trainer, TrainerConfig

VOCABULARY = 256
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
)
SECTIONS: dict[str, dict[str, Any]] = {
    "student": {"model": "student"},
    "teacher": {"teacher_model": "teacher"},
    "distill": {"beta": 0.5},
    "parallel": {},
    "data": {"dataset": ["none"]},
    "train": {"global_batch_size": 1, "train_iters": 100, "lr": 1e-4, "dtype": "fp32"},
    "output": {"output_dir": "none"},
}


def save_model(folder: Path, layers: int, *, experts: int | None = None, **sizes: int) -> Path:
    """Write a random Qwen3 model and return its folder."""
    common: dict[str, Any] = SIZES | {"num_hidden_layers": layers} | sizes
    config: PretrainedConfig = Qwen3Config(**common)
    if experts is not None:
        config = Qwen3MoeConfig(**common, num_experts=experts, moe_intermediate_size=32, num_experts_per_tok=2)
    torch.manual_seed(layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.should_save_on_this_rank = lambda is_main_process: True  # transformers 5.19 would write in rank 0 only
    model.save_pretrained(folder)
    return folder


def recipe_of(changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe of this module's models with other values in some sections."""
    sections = {name: section | changes.get(name, {}) for name, section in SECTIONS.items()}
    return Recipe.model_validate(sections | {"lora": changes.get("lora")})


@dataclass(frozen=True)
class RandomRun:
    """A student and a teacher over a mesh, with rows of random tokens."""

    mesh: Mesh
    student: Student
    teacher: TeacherSource | None
    vocab_size: int

    @classmethod
    def build(cls, changes: Mapping[str, Any], student: Path, teacher: Path) -> RandomRun:
        """Build the models of `recipe_of(changes)` in the processes of the default group. All ranks must call it."""
        recipe = recipe_of(changes)
        mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
        checkpoint = Checkpoint.open(str(student))
        teachers = {"teacher": Checkpoint.open(str(teacher))} if recipe.teacher.source == "local" else {}
        vocab_size = min(one.vocab_size for one in (checkpoint, *teachers.values()))
        model = build_student(recipe, mesh, checkpoint, vocab_size, train_iters=100)
        return cls(mesh, model, build_teacher(recipe, mesh, model, teachers), vocab_size)

    def microbatches(self, count: int, length: int, seed: int = 0) -> list[Microbatch]:
        """Return this rank's part of `count` rows of `length` tokens, one in a microbatch, all but the first a label.

        Data-parallel ranks have different rows.
        """
        generator = np.random.default_rng([seed, self.mesh.dp.rank()])
        rows = [generator.integers(0, self.vocab_size, length) for _ in range(count)]
        samples = [
            Sample(input_ids=row, labels=np.append(row[1:], -100), source="dataset", row_id=index)
            for index, row in enumerate(rows)
        ]
        layout, cp = self.mesh.layout, self.mesh.cp
        return [
            shard_context_parallel(collate([one], pad_multiple=layout.pad_multiple), cp.rank(), cp.size()).to(
                portability.device()
            )
            for one in samples
        ]

    def trainer(self, folder: Path) -> Trainer:
        """Return a trainer that reports to nobody."""
        batches: Sequence[None] = ()
        nobody: Any = SimpleNamespace(step=lambda record: None, plot=lambda: None)
        output = RunOutput(nobody, Exports(folder))
        return Trainer(TrainerConfig(train_iters=100), self.student, self.teacher, TrainingData(batches), output)
