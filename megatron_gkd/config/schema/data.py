"""The section `data`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.schema.base import PathText, Section, as_sequence


class DatasetEntry(Section):
    """One source of rows: a JSONL or Parquet file, or a saved `datasets` folder."""

    path: PathText
    weight: float = Field(1.0, gt=0)


def _as_entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Datasets = Annotated[tuple[Annotated[DatasetEntry, BeforeValidator(_as_entry)], ...], BeforeValidator(as_sequence)]


class DataSection(Section):
    """Rows, and how they become training sequences."""

    dataset: Datasets = Field(
        min_length=1, description="training rows; a weight is how many times a file is passed over in an epoch"
    )
    val_dataset: Datasets = Field((), description="validation rows")
    max_length: int = Field(2048, ge=2, description="longest sequence, in tokens")
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
    truncation_strategy: Literal["delete", "left", "right"] = Field(
        "delete",
        description="rows longer than max_length: leave out, cut the prompt's start, or cut the end; where lmbda > 0 "
        "also rows whose prompt leaves too little room for a completion (rollout.max_completion_length): leave out, or "
        "with left and right cut the prompt's start. Rows whose teacher_prompt does so are always left out",
    )
    loss_on: Literal["last", "all"] = Field("last", description="train on the last assistant turn or on all of them")
    data_errors: Literal["raise", "skip"] = Field("raise", description="a bad row ends the run, or is left out")
    preprocessor: str | None = Field(None, description="name of a row preprocessor that a plugin registers")
    external_plugins: Annotated[tuple[PathText, ...], BeforeValidator(as_sequence)] = Field(
        (), description="Python files to load before the data is read"
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
    def longest_for_teacher(self) -> int:
        """Tokens of the longest sequence that the teacher reads."""
        return max(self.max_length, self.teacher_max_length or 0)
