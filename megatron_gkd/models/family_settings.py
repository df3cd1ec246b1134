"""Settings of Megatron's model that mcore-bridge derives wrongly, or that differ for a student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_gkd.checkpoint_format.layer_limits import layout_problems
from megatron_gkd.checkpoint_format.lora_layers import why_no_adapters
from megatron_gkd.config.stages import StageProblem
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.runtime.mesh import Layout

if TYPE_CHECKING:
    from megatron_gkd.models.build_options import BuildOptions


def family_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings that replace mcore-bridge's for a checkpoint."""
    text = checkpoint.text_config.to_dict()
    parameters = text.get("rope_parameters") or {}
    is_partial = checkpoint.family.has_partial_rope and "partial_rotary_factor" in parameters
    partial_rope = {"partial_rotary_factor": parameters["partial_rotary_factor"]} if is_partial else {}
    return {
        # mcore-bridge reads text_config before the whole, transformers the other way round
        "untie_embeddings_and_output_weights": not checkpoint.is_tied,
        # the loss is over the next token alone
        "mtp_num_layers": None,
        # Megatron would move the experts' correction biases after every step, without a gradient
        "moe_router_bias_update_rate": 0.0,
        **partial_rope,
        **checkpoint.family.overrides(text),
    }


def require_family_supports(checkpoint: Checkpoint, layout: Layout, *, has_lora: bool) -> None:
    """Check what the recipe's checks can't know of a hub id.

    Raises:
        UserError: in all ranks, which have the same checkpoint; the family does not have this layout or adapters.
    """
    shape, sizes = checkpoint.shape, dict(context=layout.context, expert_tensor=layout.expert_tensor)
    for problem in layout_problems(shape, str(checkpoint.path), **sizes):
        raise UserError(problem)
    if has_lora and not shape.takes_lora:
        raise UserError(f"train.tuner_type = lora: {why_no_adapters(shape.model_type)}; use full")


def require_stages(checkpoint: Checkpoint, pipeline: int, options: BuildOptions) -> tuple[int, ...]:
    """Return the number of decoder layers of each pipeline stage, in the model's order.

    Args:
        checkpoint: the model's.
        pipeline: number of pipeline ranks.
        options: with the keys of the stages.

    Raises:
        UserError: the stages do not suit the number of the model's layers.
    """
    try:
        return options.stages.layers(checkpoint.shape.num_layers, pipeline, options.virtual_pipeline)
    except StageProblem as problem:
        prefix = "parallel." if options.stages.are_equal else options.stages.prefix
        raise UserError(f"{problem.line(prefix)} ({checkpoint.path})") from problem
