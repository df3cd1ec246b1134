"""The section `train`."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.schema.base import Duration, PathText, Section

FULL_LR, LORA_LR = 1e-5, 1e-4
MOST_SEED = 2**31 - 1  # Megatron-Core adds numbers of ranks, and NumPy takes seeds below 2**32
MOST_STEPS, MOST_EPOCHS = 10**9, 10**6


class TrainSection(Section):
    """The optimization."""

    micro_batch_size: int = Field(1, ge=1, description="rows in one forward pass of one data-parallel rank")
    global_batch_size: int = Field(8, ge=1, description="rows in one optimizer step, over all ranks, packed or not")
    train_iters: int | None = Field(None, ge=1, le=MOST_STEPS, description="optimizer steps; this or num_train_epochs")
    num_train_epochs: float | None = Field(
        None, gt=0, le=MOST_EPOCHS, description="passes over the training rows; this or train_iters"
    )
    tuner_type: Literal["lora", "full"] | None = Field(
        None, description="lora: train adapters; full: all parameters; null: adapters where there is a section lora"
    )
    lr: float = Field(FULL_LR, gt=0, description=f"highest learning rate; with adapters {LORA_LR} unless it is set")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    lr_decay_style: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after the warm-up")
    lr_warmup_iters: int = Field(0, ge=0, description="steps of linear warm-up")
    lr_warmup_fraction: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a share of all steps, in place of lr_warmup_iters"
    )
    freeze_vit: bool | None = Field(
        None, description="leave a multimodal student's vision tower as it is, without its aligner; null: true"
    )
    freeze_aligner: bool | None = Field(
        None, description="leave what connects the vision tower to the language model as it is; null: true"
    )
    freeze_llm: bool = Field(False, description="leave a multimodal student's language model as it is")
    vit_lr: float | None = Field(
        None, gt=0, description="highest learning rate of the vision tower, on the schedule of lr; null: lr"
    )
    aligner_lr: float | None = Field(
        None, gt=0, description="highest learning rate of the aligner, on the schedule of lr; null: lr"
    )
    vit_gradient_checkpointing: bool = Field(
        False, description="compute the vision tower's activations again in the backward pass, which saves memory"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of Adam's second moment")
    adam_eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    clip_grad: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0: no clipping")
    resume: PathText = Field(
        "auto",
        description="auto: continue from the newest whole checkpoint in output_dir, if there is one; never: start "
        "anew; or the path of a checkpoint or of a run, from which the same command continues once it was begun",
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
    seed: int = Field(1234, ge=0, le=MOST_SEED, description="seed of the data order and of everything random")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="type of weights and activations; the optimizer has fp32"
    )
    attention_backend: Literal["auto", "flash", "fused", "sdpa"] = Field(
        "auto",
        description="flash and fused are Transformer Engine's, for bf16 on GPUs; sdpa is torch's; auto: one of "
        "Transformer Engine's where it is installed and dtype is bf16, else sdpa",
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
