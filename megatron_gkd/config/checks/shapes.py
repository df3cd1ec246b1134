"""The shapes of the recipe's models, for checks of other keys."""

from megatron_gkd.checkpoint_format.model_shape import ModelShape, read_shape


def shape_of(model: str) -> ModelShape | None:
    """Return the shape of a local model; None for a hub id, and for one that the check of its own key refuses."""
    try:
        return read_shape(model)
    except ValueError:
        return None
