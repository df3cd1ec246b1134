"""Whether the keys of multimodal students go together, and suit the student and the layout."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.shapes import STAGE_LEAVES, pipelines, shape_of
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.stages import StageProblem
from megatron_gkd.config.vision_rules import IMAGE_KEYS, PARTS, describe_image_keys, frozen_parts

_FREEZE = ("freeze_vit", "freeze_aligner", "freeze_llm")
_RATES = {"vit_lr": "vit", "aligner_lr": "aligner"}


@check(*_FREEZE)
def something_is_trained(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a student of which nothing is trained."""
    t = recipe.train
    if len(frozen_parts(t)) == len(PARTS):
        yield (
            "train.freeze_llm = true: at least one part must be trained; set freeze_vit = false or "
            "freeze_aligner = false, or freeze_llm = false"
        )


@check(*_FREEZE, *_RATES)
def rates_are_of_trained_parts(recipe: Recipe, _: int) -> Iterator[str]:
    """Find learning rates of parts that are not trained."""
    frozen = frozen_parts(recipe.train)
    for leaf, part in _RATES.items():
        rate = getattr(recipe.train, leaf)
        if rate is not None and part in frozen:
            yield f"train.{leaf} = {rate}: this part is not trained; set freeze_{part} = false, or leave it out"


@check("model", *IMAGE_KEYS, needs_files=True)
def parts_are_in_the_student(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of multimodal students beside a student of text alone."""
    shape = shape_of(recipe.student.model)
    if shape is None or shape.has_images:
        return
    for described in describe_image_keys(recipe.train):
        yield f"{described}: only with a student that reads images; {recipe.student.model} does not"


@check("model", *SOURCE, *STAGE_LEAVES, needs_files=True)
def first_stage_has_the_layers_of_image_features(recipe: Recipe, _: int) -> Iterator[str]:
    """Find first stages with fewer layers than there are features of images for the first layers."""
    for model in pipelines(recipe):
        try:
            layers = model.stages.layers(model.shape.num_layers, model.pipeline, model.virtual)
        except StageProblem:  # reported by other checks
            continue
        if layers[0] >= model.shape.num_deepstack:
            continue
        leaves, stages = "pipeline_model_parallel_size", len(layers)
        leaves += " x virtual_pipeline_model_parallel_size" if model.virtual else ""
        yield (
            f"parallel.{leaves} = {stages}: gives the first stage {layers[0]} of {model.shape.num_layers} layers; must "
            f"give it the {model.shape.num_deepstack} layers to which {model} adds features of images"
        )
