"""The section `distill`."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.divergences import DivergenceName
from megatron_gkd.config.schema.base import Section


class DistillSection(Section):
    """The loss of generalized knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649)."""

    divergence: DivergenceName = Field(
        "jsd", description="generalized Jensen-Shannon, or another divergence of teacher T and student S (docs/loss.md)"
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="the teacher's weight in its mixture with the student; jsd: 0 forward KL, 1 reverse",
    )
    lmbda: float = Field(
        0.0, ge=0, le=1, description="probability of training on completions that the student itself samples"
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
        description="the tokens beyond gkd_logits_topk: left out (renormalize), or one more outcome (bucket)",
    )
    loss_chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="rows of logits that the fused head and loss hold at once; null: as many as fit into 2 GiB",
    )
