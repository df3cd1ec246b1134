"""The shapes of the recipe's models, for checks of other keys."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gkd.checkpoint_format.model_shape import ModelShape, read_shape
from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.stages import STAGE_KEYS, Stages

STAGE_LEAVES = (
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    *STAGE_KEYS,
    *(f"teacher_{leaf}" for leaf in STAGE_KEYS),
)
"""The keys that `pipelines` reads beside the models."""


def shape_of(model: str) -> ModelShape | None:
    """Return the shape of a local model; None for a hub id, and for one that the check of its own key refuses."""
    try:
        return read_shape(model)
    except ValueError:
        return None


@dataclass(frozen=True)
class ModelPipeline:
    """The pipeline of a local checkpoint.

    Attributes:
        key: the model's key in the recipe.
        path: its value.
        shape: of the model.
        stages: the keys of its stages.
        pipeline: number of pipeline ranks.
        virtual: number of chunks on each; None for one.
    """

    key: str
    path: str
    shape: ModelShape
    stages: Stages
    pipeline: int
    virtual: int | None

    def __str__(self) -> str:
        return f"{self.key} ({self.path})"


def pipelines(recipe: Recipe) -> Iterator[ModelPipeline]:
    """Yield the student's pipeline and those of the local teachers, where the shapes of the models are known."""
    p = recipe.parallel
    pipeline, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    model, own = recipe.student.model, Stages.of_student(p)
    if (shape := shape_of(model)) is not None:
        yield ModelPipeline("student.model", model, shape, own, pipeline, virtual)
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "local" and teacher.teacher_model and (shape := shape_of(teacher.teacher_model)):
            key, stages = f"{place}.teacher_model", Stages.of_teacher(place, teacher)
            yield ModelPipeline(key, teacher.teacher_model, shape, stages, pipeline, None)
