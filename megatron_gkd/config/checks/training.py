"""Whether the keys of the optimization go together."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe


@check("packing", "micro_batch_size")
def packed_microbatches_are_one_row(recipe: Recipe, _: int) -> Iterator[str]:
    """Find packed microbatches of several rows."""
    if recipe.data.packing and recipe.train.micro_batch_size != 1:
        yield (
            f"train.micro_batch_size = {recipe.train.micro_batch_size}: must be 1 with data.packing, "
            "where max_length decides how many rows a microbatch holds"
        )


@check("train_iters", "num_train_epochs")
def run_has_an_end(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a run without a length, or with two."""
    iters, epochs = recipe.train.train_iters, recipe.train.num_train_epochs
    if (iters is None) == (epochs is None):
        which = "null" if iters is None else "both set"
        yield f"train.train_iters, train.num_train_epochs = {which}: exactly one of the two must be set"


@check("min_lr", "lr")
def learning_rate_decays(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a learning rate that would grow."""
    if recipe.train.min_lr > recipe.train.lr:
        yield f"train.min_lr = {recipe.train.min_lr}: must be <= lr ({recipe.train.lr})"


@check("lr_warmup_iters", "lr_warmup_fraction", "train_iters")
def warmup_ends(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a warm-up of two lengths, or one that is as long as the run."""
    t = recipe.train
    if t.lr_warmup_iters and t.lr_warmup_fraction is not None:
        key = f"train.lr_warmup_fraction = {t.lr_warmup_fraction}"
        yield f"{key}: must be null beside lr_warmup_iters ({t.lr_warmup_iters})"
    if t.train_iters is not None and t.lr_warmup_iters >= t.train_iters:
        yield f"train.lr_warmup_iters = {t.lr_warmup_iters}: must be < train_iters ({t.train_iters})"


@check("eval_interval", "eval_iters", "val_dataset", "split_dataset_ratio")
def validation_has_rows(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a validation without rows."""
    for leaf in ("eval_interval", "eval_iters"):
        if getattr(recipe.train, leaf) is not None and not recipe.data.has_validation:
            yield f"train.{leaf} = {getattr(recipe.train, leaf)}: needs data.val_dataset or data.split_dataset_ratio"
