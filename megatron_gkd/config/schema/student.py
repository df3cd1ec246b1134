"""The section `student`."""

from pydantic import Field

from megatron_gkd.config.schema.base import PathText, Section


class StudentSection(Section):
    """The model that is trained."""

    model: PathText = Field(description="the student: a local Hugging Face directory or a hub id")
