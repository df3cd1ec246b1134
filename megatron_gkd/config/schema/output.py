"""The section `output`."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.schema.base import PathText, Section


class OutputSection(Section):
    """What a run writes."""

    output_dir: PathText = Field(description="folder of metrics, curves, the resolved recipe and the exports")
    save_interval: int | None = Field(
        500,
        ge=1,
        description="steps between checkpoints, from which a run is resumed; one is saved at the end, too; null: none",
    )
    export_interval: int | None = Field(
        None, ge=1, description="steps between Hugging Face exports; null: only the last"
    )
    save_optim: bool = Field(
        True, description="checkpoints hold the optimizer's state (12 bytes a parameter in bf16), which resuming needs"
    )
    async_save: bool = Field(True, description="write checkpoints while the training goes on")
    log_interval: int = Field(1, ge=1, description="steps between two lines of progress where there is no terminal")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe messages that are logged"
    )
    log_ranks: Literal["main", "all"] = Field(
        "main", description="ranks whose messages go to the console; the others write to output_dir/logs"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
    save_total_limit: int | None = Field(3, ge=1, description="newest checkpoints to keep, beside the best; null: all")
    export_total_limit: int | None = Field(None, ge=1, description="newest step exports of this run to keep; null: all")
    log_completions: bool = Field(
        False, description="write the student's completions, with the divergence of each token, to completions.jsonl"
    )
    log_completions_interval: int = Field(
        10, ge=1, description="log_completions: one in so many of the steps that sample completions is written"
    )
    completions_to_print: int = Field(
        2, ge=0, description="how many completions of such a step the console and TensorBoard show"
    )
