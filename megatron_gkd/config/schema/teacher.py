"""The section `teacher`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.schema.base import PathText, Section, ServerUrl, as_sequence
from megatron_gkd.config.schema.megatron import Fp8Format, Fp8Recipe

TeacherKind = Literal["local", "server", "self", "cache", "none"]


class OneTeacher(Section):
    """One model that the student is trained to match."""

    teacher_kind: TeacherKind | None = Field(
        None,
        description="local: a Megatron model beside the student; server: vLLM servers; self: the student itself, with "
        "each row's teacher_prompt; cache: log-probabilities of an earlier `score`; none: plain cross-entropy; null: "
        "local, server or cache, whichever is named; where none is, self if rows have a teacher_prompt",
    )
    teacher_model: PathText | None = Field(
        None,
        description="local: a Hugging Face directory or a hub id; self: student.model for the student's initial "
        "weights, null for its current ones",
    )
    teacher_model_revision: str | None = Field(
        None, min_length=1, description="local: branch, tag or commit of teacher_model on its hub; null: the newest"
    )
    teacher_trust_remote_code: bool = Field(
        False, description="local: run a tokenizer that is code in the folder of teacher_model"
    )
    teacher_model_server: Annotated[tuple[ServerUrl, ...], BeforeValidator(as_sequence)] = Field(
        (), description="server: addresses of vLLM servers of one teacher (http://host:8000), which share the rows"
    )
    teacher_server_api_key_env: str | None = Field(
        None, min_length=1, description="server: environment variable with the servers' API key"
    )
    teacher_server_concurrency: int = Field(
        64, ge=1, description="server: requests in flight, over all servers, of one data-parallel rank"
    )
    teacher_server_timeout_s: float = Field(600.0, gt=0, description="server: longest time of one response, in seconds")
    teacher_server_max_downtime_s: float = Field(
        300.0, ge=0, description="server: how long servers may be unavailable before the run stops, in seconds"
    )
    teacher_server_check_interval: int = Field(
        10, ge=1, description="server: steps between checks, with a known prompt, that each server has the same model"
    )
    teacher_cache: PathText | None = Field(
        None,
        description="folder with the teacher's log-probabilities of each row, written by `megatron-gkd score`; a "
        "teacher beside it scores the rows that are missing there",
    )
    teacher_adapters: PathText | None = Field(
        None, description="local: folder of PEFT adapters of teacher_model, merged into its weights as they are read"
    )
    offload_teacher_model: bool = Field(False, description="keep the teacher in host memory while it does not score")
    teacher_states: Literal["device", "host"] = Field(
        "device",
        description="local, self: where a step's hidden states of the teacher wait for the student; host: in "
        "page-locked memory, copied back one microbatch ahead",
    )
    teacher_micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="local, self: join whole microbatches for a forward pass of the teacher, up to so many tokens; "
        "null: the student's microbatches",
    )
    teacher_decoder_first_pipeline_num_layers: int | None = Field(
        None, ge=1, description="local: layers on the teacher's first stage; null: equal shares"
    )
    teacher_decoder_last_pipeline_num_layers: int | None = Field(
        None, ge=1, description="local: layers on the teacher's last stage; null: equal shares"
    )
    teacher_pipeline_model_parallel_layout: str | None = Field(
        None, min_length=1, description="local: the teacher's stages, as parallel.pipeline_model_parallel_layout"
    )
    teacher_fp8_format: Fp8Format | None = Field(
        None,
        description="local: compute the teacher's linear layers in FP8 by Transformer Engine; null: in train.dtype",
    )
    teacher_fp8_recipe: Fp8Recipe = Field("delayed", description="teacher_fp8_format: how FP8 values are scaled")
    teacher_ema: float | None = Field(
        None, gt=0, lt=1, description="self: score with a moving average of the weights; its decay for each step"
    )

    @property
    def source(self) -> TeacherKind | None:
        """`teacher_kind`, or what follows from the other keys; None where nothing does.

        Where no teacher is named it is the student itself, provided that rows have a `teacher_prompt`.
        """
        if self.teacher_kind is not None:
            return self.teacher_kind
        if self.teacher_model_server:
            return "server"
        if self.teacher_model:
            return "local"
        return "cache" if self.teacher_cache else self._source_without_name

    @property
    def is_named(self) -> bool:
        """Whether a key names the teacher or its kind."""
        return bool(self.teacher_kind or self.teacher_model_server or self.teacher_model or self.teacher_cache)

    @property
    def _source_without_name(self) -> TeacherKind | None:
        return "self"


class TaggedTeacher(OneTeacher):
    """A teacher of the rows that have one of its tags."""

    tags: Annotated[tuple[str, ...], BeforeValidator(as_sequence)] = Field(
        min_length=1, description="values of teacher_tag_key whose rows this teacher scores"
    )

    @property
    def _source_without_name(self) -> TeacherKind | None:
        return None


class TeacherSection(OneTeacher):
    """What the student is trained to match: one model, or several that share the rows."""

    teachers: tuple[TaggedTeacher, ...] = Field(
        (), description="several teachers, each with the keys above and its tags, in place of one"
    )
    teacher_tag_key: str | None = Field(
        None,
        description="teachers: the rows' key that holds a teacher's tag; dataset: the tag is the source of the row, as "
        "data.dataset names it",
    )
    check_tokenizers: Literal["strict", "warn"] = Field(
        "strict",
        description="tokens that student and teacher decode differently: end the run at its start, or are listed in a "
        "warning",
    )

    @property
    def all(self) -> dict[str, OneTeacher]:
        """Every teacher under its place in the recipe."""
        if not self.teachers:
            return {"teacher": self}
        return {f"teacher.teachers[{index}]": teacher for index, teacher in enumerate(self.teachers)}
