"""The recipe's sections. A field's type and bounds are its validation, its description is its line in --help.

Leaf names are unique over all sections, so that `--beta 1.0` names the same key as `--distill.beta 1.0`. What involves
more than one key, or the file system, is in `checks.py` and `model_checks.py`.
"""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from megatron_gkd.config import yaml_text
from megatron_gkd.config.divergences import DivergenceName
from megatron_gkd.config.durations import parse_duration

PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(os.path.expanduser)]
ServerUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+/?$")]

TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, StringConstraints(min_length=1)]
ModuleName = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

FULL_LR, LORA_LR = 1e-5, 1e-4


def _as_sequence(value: Any) -> Any:
    """One entry may stand without the brackets: `dataset: train.jsonl`."""
    return [value] if isinstance(value, str | dict | int) else value


def _as_seconds(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(_as_seconds)]


class Section(BaseModel):
    """Frozen, without unknown keys. Text that reads as a number is one (`1e-4`); true and false never are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_stay_booleans(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not a value of this key")
        return value


class StudentSection(Section):
    """The model that learns."""

    model: PathText = Field(description="the student: a local Hugging Face directory or a hub id")


TeacherKind = Literal["local", "server", "self", "cache", "none"]


class OneTeacher(Section):
    """One model that is learnt from."""

    kind: TeacherKind | None = Field(
        None,
        description="local: a Megatron model beside the student; server: vLLM servers; self: the student itself, with "
        "each row's teacher_prompt; cache: what another run has scored; none: plain cross-entropy; null: local, server "
        "or cache, whichever is named",
    )
    teacher_model: PathText | None = Field(
        None,
        description="local: a Hugging Face directory or a hub id; self: student.model for the weights that it began "
        "with, null for those that it has",
    )
    teacher_model_server: Annotated[tuple[ServerUrl, ...], BeforeValidator(_as_sequence)] = Field(
        (), description="server: addresses of vLLM servers of one teacher (http://host:8000), which rows are dealt to"
    )
    teacher_server_concurrency: int = Field(
        64, ge=1, description="server: requests in flight, over all servers, of one data-parallel rank"
    )
    teacher_server_timeout_s: float = Field(600.0, gt=0, description="server: longest time of one answer, in seconds")
    teacher_server_patience_s: float = Field(
        300.0, ge=0, description="server: how long servers may be gone before the run stops, in seconds"
    )
    teacher_server_check_interval: int = Field(
        10, ge=1, description="server: steps between checks, by a known prompt, that each server still has its model"
    )
    cache: PathText | None = Field(
        None,
        description="folder of what the teacher says of each row, by `megatron-gkd score`; a teacher beside it judges "
        "the rows that are not there",
    )
    teacher_adapters: PathText | None = Field(
        None, description="local: folder of PEFT adapters of teacher_model, merged into its weights as they are read"
    )
    offload_teacher_model: bool = Field(False, description="keep the teacher in host memory between scorings")
    ema: float | None = Field(
        None, gt=0, lt=1, description="self: judge with a moving average of the weights; its decay for each step"
    )

    @property
    def source(self) -> TeacherKind | None:
        """`kind`, or what follows from the other keys; None where nothing does."""
        beside_none = "cache" if self.cache else None
        named = "server" if self.teacher_model_server else "local" if self.teacher_model else beside_none
        return self.kind or named


class TaggedTeacher(OneTeacher):
    """A teacher of the rows that have one of its tags."""

    tags: Annotated[tuple[str, ...], BeforeValidator(_as_sequence)] = Field(min_length=1)


class TeacherSection(OneTeacher):
    """What is learnt from: one model, or several that share the rows."""

    teachers: tuple[TaggedTeacher, ...] = Field(
        (), description="several teachers, each with the keys above and its tags, in place of one"
    )
    teacher_tag_key: str | None = Field(None, description="teachers: the rows' key that holds a teacher's tag")

    @property
    def all(self) -> dict[str, OneTeacher]:
        """Every teacher under its place in the recipe."""
        if not self.teachers:
            return {"teacher": self}
        return {f"teacher.teachers[{index}]": teacher for index, teacher in enumerate(self.teachers)}


class DistillSection(Section):
    """The loss of generalized knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649)."""

    divergence: DivergenceName = Field(
        "jsd", description="generalized Jensen-Shannon, or another between teacher T and student S; see the README"
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="the teacher's weight in its mixture with the student; jsd: 0 forward KL, 1 reverse",
    )
    lmbda: float = Field(
        0.0, ge=0, le=1, description="probability of training on what the student itself has just sampled"
    )
    lmbda_granularity: Literal["step", "row"] = Field(
        "step", description="lmbda decides once for a global batch, or for each of its rows"
    )
    temperature: float = Field(0.9, ge=1e-2, le=1e3, description="divides both models' logits before the divergence")
    sft_alpha: float = Field(0.0, ge=0, description="weight of the cross-entropy on dataset rows beside the divergence")
    gkd_logits_topk: int | None = Field(
        None, ge=1, description="compare the teacher's most likely tokens only, this many; null: the whole vocabulary"
    )
    gkd_topk_tail: Literal["renormalize", "bucket"] = Field(
        "renormalize",
        description="what the rest of the vocabulary is beside gkd_logits_topk: left out, or one more outcome",
    )
    loss_chunk_tokens: int = Field(1024, ge=1, description="rows of logits that the fused head and loss hold at once")


class RolloutSection(Section):
    """How the student samples where lmbda has it so."""

    engine: Literal["megatron", "vllm", "vllm_server"] = Field(
        "megatron",
        description="megatron: the sharded student itself; vllm: vLLM in the training processes; "
        "vllm_server: vLLM servers that run already",
    )
    max_completion_length: int = Field(
        512,
        ge=1,
        description="most tokens of a completion, within data.max_length; room for as many, but at most a quarter of "
        "max_length, is kept free behind each prompt that the student may answer (see data.truncation_strategy)",
    )
    rollout_temperature: float = Field(
        1.0, ge=1e-2, le=1e3, description="divides the logits that tokens are drawn from"
    )
    top_k: int | None = Field(None, ge=1, description="draw from that many most likely tokens only; null: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the most likely tokens of this mass only")
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_as_sequence)] = Field(
        (), description="tokens that end a completion, beside the student's EOS"
    )
    stop: Annotated[tuple[StopText, ...], BeforeValidator(_as_sequence)] = Field(
        (), description="texts that end a completion, which keeps them"
    )
    truncated: Literal["keep", "mask", "drop"] = Field(
        "keep", description="completions that end at max_completion_length: train on, leave without loss, or leave out"
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="vllm: neighbouring ranks that share one vLLM engine")
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="vllm: share of each device's memory for vLLM's weights and cache"
    )
    vllm_kv_cache_gib: float | None = Field(
        None, gt=0, description="vllm: its cache in GiB a rank; null: what vllm_gpu_memory_utilization leaves"
    )
    vllm_max_model_len: int | None = Field(
        None, ge=2, description="vllm: longest prompt with its completion, in tokens; null: data.max_length"
    )
    sleep_level: int = Field(
        2,
        ge=0,
        le=2,
        description="vllm: GPU memory that it gives up between rollouts: 0 none; 1 its cache, with the weights "
        "in host memory; 2 cache and weights",
    )
    enforce_eager: bool = Field(False, description="vllm: without CUDA graphs and compilation; always so on CPUs")
    vllm_server_urls: Annotated[tuple[ServerUrl, ...], BeforeValidator(_as_sequence)] = Field(
        (), description="vllm_server: addresses of the servers, which prompts are dealt to (http://host:8000)"
    )
    weight_sync: Literal["folder", "nccl", "gloo", "lora"] = Field(
        "folder",
        description="vllm_server: new weights go through a shared folder, or vLLM's weight transfer on GPUs (nccl) or "
        "on CPUs (gloo); lora: adapters alone, through the folder, to servers of student.model that take them at run "
        "time",
    )
    weight_sync_dir: PathText | None = Field(
        None,
        description="weight_sync folder and lora: where the folder is, under one path here and on the servers; "
        "null: rollout_weights in output_dir",
    )
    steps_ahead: int = Field(
        0, ge=0, le=1, description="vllm_server: 1 samples a step while the one before it trains, with older weights"
    )
    mismatch_kl_threshold: float | None = Field(
        0.1, gt=0, description="warn where the engine's log-probabilities are so far from the trainer's (nats a token)"
    )
    server_concurrency: int = Field(
        64, ge=1, description="vllm_server: requests in flight, over all servers, of one data-parallel rank"
    )
    server_timeout_s: float = Field(600.0, gt=0, description="vllm_server: longest time of one answer, in seconds")
    server_patience_s: float = Field(
        300.0, ge=0, description="vllm_server: how long a server may be gone before the run stops, in seconds"
    )


class ParallelSection(Section):
    """How the models are laid out over the processes; the names are Megatron-Core's."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="ranks that share each layer's matrices")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="stages that the layers are dealt over")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="model chunks per pipeline rank (interleaved schedule); the student's only"
    )
    context_parallel_size: int = Field(1, ge=1, description="ranks that share each sequence's tokens")
    expert_model_parallel_size: int = Field(1, ge=1, description="ranks that the experts are dealt over")
    expert_tensor_parallel_size: int = Field(1, ge=1, description="ranks that share each expert's matrices")
    sequence_parallel: bool = Field(
        False, description="shard the activations between tensor-parallel regions; off where tensor parallelism is 1"
    )
    distributed_optimizer: bool = Field(True, description="shard the optimizer's state over data-parallel ranks")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward pass runs")
    overlap_param_gather: bool = Field(False, description="gather parameters while the forward pass runs")
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="recompute activations in the backward pass: whole layers, or the attention core only"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="full recompute: layers in equal groups, or the first layers of each stage"
    )
    recompute_num_layers: int | None = Field(
        None, ge=1, description="full recompute: layers to a group (uniform), or how many layers (block)"
    )

    @property
    def effective_sequence_parallel(self) -> bool:
        """`sequence_parallel`, where there are tensor-parallel ranks for it to mean something."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1


class DatasetEntry(Section):
    """One source of rows: a JSONL or Parquet file, or a saved `datasets` folder."""

    path: PathText
    weight: float = Field(1.0, gt=0)


def _as_entry(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Datasets = Annotated[tuple[Annotated[DatasetEntry, BeforeValidator(_as_entry)], ...], BeforeValidator(_as_sequence)]


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
        description="longest sequence, in tokens, that a row's teacher_prompt and its response may make; "
        "null: max_length",
    )
    packing: bool = Field(False, description="fill microbatches of max_length tokens with whole rows")
    truncation_strategy: Literal["delete", "left", "right"] = Field(
        "delete",
        description="rows longer than max_length: leave out, cut the prompt's start, or cut the end; where lmbda > 0 "
        "also rows whose prompt leaves too little room for a completion (rollout.max_completion_length): leave out, or "
        "with left and right cut the prompt's start. Rows whose teacher_prompt does so are always left out",
    )
    loss_on: Literal["last", "all"] = Field("last", description="train on the last assistant turn or on all of them")
    data_errors: Literal["raise", "skip"] = Field("raise", description="a bad row ends the run, or is left out")
    preprocessor: str | None = Field(None, description="name of a row preprocessor that a plugin registers")
    external_plugins: Annotated[tuple[PathText, ...], BeforeValidator(_as_sequence)] = Field(
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
        "tokenize each for itself",
    )

    @property
    def longest_for_teacher(self) -> int:
        """Tokens of the longest sequence that the teacher reads."""
        return max(self.max_length, self.teacher_max_length or 0)


class TrainSection(Section):
    """The optimisation."""

    micro_batch_size: int = Field(1, ge=1, description="rows in one forward pass of one data-parallel rank")
    global_batch_size: int = Field(8, ge=1, description="rows in one optimizer step, over all ranks, packed or not")
    train_iters: int | None = Field(None, ge=1, description="optimizer steps; this or num_train_epochs")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the training rows; this or train_iters")
    tuner_type: Literal["lora", "full"] | None = Field(
        None, description="lora: train adapters; full: all parameters; null: adapters where there is a section lora"
    )
    lr: float = Field(FULL_LR, gt=0, description=f"highest learning rate; with adapters {LORA_LR} unless it is set")
    min_lr: float = Field(0.0, ge=0, description="learning rate that the decay ends at")
    lr_decay_style: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    lr_warmup_iters: int = Field(0, ge=0, description="steps of linear warm-up")
    lr_warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a share of all steps, in place of lr_warmup_iters"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of Adam's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0: no clipping")
    resume: PathText = Field(
        "auto",
        description="auto: continue from the newest whole checkpoint in output_dir, if there is one; never: start "
        "anew; or the path of a checkpoint or of a run",
    )
    init_from: PathText | None = Field(
        None, description="checkpoint or run whose weights to start from, with a new optimizer and schedule"
    )
    max_runtime: Duration | None = Field(
        None,
        gt=0,
        description="longest time of the run with its start-up; shortly before, the run is saved and ends with exit "
        "code 75; null: no limit",
    )
    max_bad_steps: int = Field(
        10,
        ge=1,
        description="steps in a row whose loss or gradient is not finite, after which the run stops; each is skipped, "
        "and its rows are written to output_dir/bad_steps",
    )
    seed: int = Field(1234, ge=0, description="seed of the data order and of everything random")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="type of weights and activations; the optimizer has fp32"
    )
    attn: Literal["auto", "flash", "fused", "sdpa"] = Field(
        "auto",
        description="attention: flash and fused are Transformer Engine's, for bf16 on GPUs; sdpa is torch's; auto: one "
        "of Transformer Engine's where it is installed and dtype is bf16, else sdpa",
    )
    moe_aux_loss_coeff: float | None = Field(
        None,
        ge=0,
        description="weight of the experts' load-balancing loss, computed for each microbatch: it depends on "
        "micro_batch_size and packing; null: the checkpoint's own",
    )
    eval_interval: int | None = Field(None, ge=1, description="steps between validations; null: at the end only")
    eval_iters: int | None = Field(
        None, ge=1, description="validate on this many times global_batch_size rows; null: on the whole split"
    )


class LoraSection(Section):
    """Low-rank adapters in place of training all parameters (Hu et al. 2021, arXiv:2106.09685)."""

    lora_rank: int = Field(8, ge=1, description="rows of the factors A and columns of the factors B")
    lora_alpha: float = Field(32.0, gt=0, description="the adapters' output is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout of the adapters' input, in training")
    lora_bias: Literal["none"] = Field("none", description="the biases stay as they are")
    target_modules: Annotated[tuple[ModuleName, ...], BeforeValidator(_as_sequence)] = Field(
        ("all-linear",),
        min_length=1,
        description="layers with adapters: all-linear (attention, MLP and experts), Hugging Face names (q_proj, k_proj "
        "and v_proj together, o_proj, gate_proj and up_proj together, down_proj, experts) or Megatron-Core's "
        "(linear_qkv, linear_proj, linear_fc1, linear_fc2)",
    )
    target_regex: str | None = Field(
        None, description="in place of target_modules: an expression that matches whole module names"
    )
    modules_to_save: Annotated[tuple[ModuleName, ...], BeforeValidator(_as_sequence)] = Field(
        (), description="modules to train whole beside the adapters; none can be"
    )
    init_lora_weights: str = Field(
        "kaiming", description="first values of the factors A: kaiming (uniform) or gaussian; B begins as zeros"
    )
    use_rslora: bool = Field(False, description="multiply by lora_alpha / sqrt(lora_rank) instead")
    use_dora: bool = Field(False, description="weight-decomposed adapters; not supported")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="other ranks by Hugging Face names, as PEFT matches them (layers.0.mlp.down_proj: 16)"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other alphas by Hugging Face names, as PEFT matches them"
    )
    lora_dtype: Literal["bf16", "fp32"] | None = Field(
        None, description="type of the adapters; null: train.dtype. The optimizer has fp32"
    )
    merge_dtype: Literal["bf16", "fp32"] | None = Field(
        None,
        description="vllm and vllm_server: type of the layers with merged adapters that the engine gets; fp32 keeps "
        "the small updates that bf16 rounds away, and has vLLM compute in fp32; null: train.dtype",
    )
    adapters: PathText | None = Field(None, description="folder of PEFT adapters to start from")
    merge_lora: bool = Field(
        False,
        description="export a whole Hugging Face checkpoint with the adapters merged, in output_dir/hf, beside the "
        "PEFT adapters, which are always in output_dir/adapters",
    )


class OutputSection(Section):
    """What a run leaves behind."""

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
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
    save_total_limit: int | None = Field(3, ge=1, description="newest checkpoints to keep, beside the best; null: all")
    export_total_limit: int | None = Field(None, ge=1, description="newest step exports of this run to keep; null: all")
    log_completions: bool = Field(
        False, description="write what the student says, with the divergence of each token, to completions.jsonl"
    )
    log_completions_interval: int = Field(10, ge=1, description="that of one step in so many in which it samples")
    completions_to_print: int = Field(
        2, ge=0, description="how many completions of such a step the console and TensorBoard show"
    )


class Recipe(Section):
    """A whole run. Build one with `megatron_gkd.config.load`, which also makes the cross-checks."""

    student: StudentSection
    teacher: TeacherSection
    distill: DistillSection
    rollout: RolloutSection = RolloutSection()
    parallel: ParallelSection
    data: DataSection
    train: TrainSection
    output: OutputSection
    lora: LoraSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_tuner(cls, tree: Any) -> Any:
        """Set what follows from training adapters: their section, and the default of `lr`."""
        train = tree.get("train") if isinstance(tree, dict) else None
        if not isinstance(train, dict):
            return tree
        if train.get("tuner_type") == "lora" and tree.get("lora") is None:
            tree = tree | {"lora": {}}
        if tree.get("lora") is not None and "lr" not in train:
            tree = tree | {"train": train | {"lr": LORA_LR}}
        return tree

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the student over `world_size` processes."""
        p = self.parallel
        return world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size)

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Replicas of each expert over `world_size` processes."""
        p = self.parallel
        return world_size // (
            p.expert_tensor_parallel_size * p.expert_model_parallel_size * p.pipeline_model_parallel_size
        )

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches of one data-parallel rank in a step without packing; packing makes them fewer."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    def to_yaml(self) -> str:
        """Every key with its value, as `load` reads it back."""
        return yaml_text.dump(self.model_dump(mode="json"))
