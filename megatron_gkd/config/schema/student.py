"""The section `student`."""

from pydantic import Field

from megatron_gkd.config.schema.base import PathText, Section


class StudentSection(Section):
    """The model that is trained."""

    model: PathText = Field(description="the student: a local Hugging Face directory or a hub id")
    model_revision: str | None = Field(
        None, min_length=1, description="branch, tag or commit of the model on its hub; null: the newest"
    )
    use_hf: bool = Field(True, description="hub ids of models and data are those of Hugging Face; false: of ModelScope")
    trust_remote_code: bool = Field(
        False, description="run a tokenizer that is code in the student's folder; other code is never run"
    )
