"""The section `data`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.loss_scale import LossScale
from megatron_gkd.config.schema.base import PathText, Section, as_sequence


class DatasetEntry(Section):
    """One source of rows: files, a folder, a URL, or a data set of a hub."""

    path: PathText = Field(
        description="a path, a pattern, a URL, or `id[:subset][:split]` of a hub, each with `#n` for n of its rows"
    )
    weight: float = Field(1.0, gt=0, description="passes over its rows in an epoch")
    columns: dict[str, str] | None = Field(
        None, description="new names of its rows' keys, in place of those of `data.columns`"
    )
    preprocessor: str | None = Field(
        None, description="name of its row preprocessor, in place of that of `data.preprocessor`"
    )


def _as_entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Datasets = Annotated[tuple[Annotated[DatasetEntry, BeforeValidator(_as_entry)], ...], BeforeValidator(as_sequence)]


class DataSection(Section):
    """Rows, and how they become training sequences."""

    dataset: Datasets = Field(
        min_length=1,
        description="training rows: files, folders, URLs, or data sets of a hub (id[:subset][:split]), each with #n "
        "for n of its rows; a weight is how many times its rows are passed over in an epoch",
    )
    val_dataset: Datasets = Field((), description="validation rows, named as in dataset")
    split_dataset_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of the training rows, drawn by the seed, that validate in place of training"
    )
    columns: dict[str, str] = Field({}, description="new names of the rows' keys, {from: to}")
    streaming: bool = Field(
        False, description="tokenize rows while training, in place of before it; train_iters is then required"
    )
    shuffle_buffer_size: int = Field(
        1000, ge=1, description="streaming: number of rows from which the next one is drawn"
    )
    group_by_length: bool = Field(
        False, description="rows of a step have about the same length; the order stays random and follows the seed"
    )
    max_length: int = Field(2048, ge=2, description="longest sequence, in tokens")
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        description="lmbda > 0: longest prompt, in tokens; longer ones are left out, or lose their start after the "
        "template's header (truncation_strategy); null: max_length - rollout.max_completion_length",
    )
    prompt_only: Literal["refuse", "on_policy_only"] = Field(
        "refuse",
        description="rows without a response, where 0 < lmbda < 1: end the run at its start, or are used by on-policy "
        "steps alone",
    )
    teacher_max_length: int | None = Field(
        None,
        ge=2,
        description="longest sequence, in tokens, of a row's teacher_prompt with its response; null: max_length",
    )
    packing: bool = Field(False, description="fill microbatches of max_length tokens with whole rows")
    min_pixels: int | None = Field(
        None, ge=1, description="smaller images are enlarged to so many pixels; null: the student's processor decides"
    )
    max_pixels: int | None = Field(
        None, ge=1, description="larger images are reduced to so many pixels; null: the student's processor decides"
    )
    max_patches: int | None = Field(
        None,
        ge=1,
        description="most image patches of a packed microbatch, by which the memory of the vision tower goes; one row "
        "may have more; null: any number",
    )
    truncation_strategy: Literal["delete", "left", "right", "split"] = Field(
        "delete",
        description="rows longer than max_length: leave out, cut the prompt's start after the template's header, or "
        "cut the end; where lmbda > 0 also rows with prompts longer than max_prompt_length: leave out, or with left "
        "and right cut the prompt's start. Rows whose teacher_prompt leaves no room for one are always left out. With "
        "split a long row of plain text becomes several sequences; only where lmbda = 0",
    )
    loss_scale: LossScale = Field(
        "last_round",
        description="train on the assistant turns after the last user message (last_round), on all of them (default), "
        "or on all tokens, prompts too (all); with +ignore_empty_think not on an empty block of thoughts",
    )
    data_errors: Literal["raise", "skip"] = Field("raise", description="a bad row ends the run, or is left out")
    preprocessor: str | None = Field(None, description="name of a row preprocessor that a plugin registers")
    external_plugins: Annotated[tuple[PathText, ...], BeforeValidator(as_sequence)] = Field(
        (), description="Python files to load before the data is read"
    )
    system: str | None = Field(
        None, description="system message, or a file with it, of conversations that have none of their own"
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="extra variables of the chat template")
    shuffle: bool = Field(True, description="a new order of the rows every epoch, from the seed")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that prepare microbatches ahead of the step")
    preprocessing_num_workers: int | None = Field(
        None, ge=1, description="processes that tokenize the rows; null: as many as there are cores, up to 16"
    )
    dataset_cache_dir: PathText | None = Field(
        None,
        description="folder of the tokenized rows; null: ~/.cache/megatron_gkd/datasets; nodes that do not share it "
        "tokenize the rows each",
    )

    @property
    def has_validation(self) -> bool:
        """Whether rows validate: those of `val_dataset`, or some of the training data."""
        return bool(self.val_dataset) or self.split_dataset_ratio > 0

    @property
    def longest_for_teacher(self) -> int:
        """Tokens of the longest sequence that the teacher reads."""
        return max(self.max_length, self.teacher_max_length or 0)
