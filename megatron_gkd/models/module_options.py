"""Options of Megatron-Core's modules, from the recipe, and the fields of its configuration that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.config.schema import MegatronSection
from megatron_gkd.config.schema.megatron import Fp8Format, Fp8Recipe
from megatron_gkd.models.fusions import FusionSwitches


@dataclass(frozen=True)
class ExpertOptions:
    """How a mixture of experts is computed, by Megatron-Core's names.

    Attributes:
        token_dispatcher: how tokens reach the ranks of their experts.
        grouped_gemm: one product for all experts of a rank.
        router_dtype: type of the router's scores; None for the model's.
        z_loss_coeff: coefficient of the router's z-loss; None for none.
        shared_expert_overlap: compute the shared expert while tokens are sent.
    """

    token_dispatcher: str = "alltoall"
    grouped_gemm: bool = True
    router_dtype: str | None = "fp32"
    z_loss_coeff: float | None = None
    shared_expert_overlap: bool = False

    def fields(self) -> dict[str, Any]:
        """Return Megatron-Core's fields."""
        return {
            "moe_token_dispatcher_type": self.token_dispatcher,
            "moe_grouped_gemm": self.grouped_gemm,
            "moe_router_dtype": self.router_dtype,
            "moe_z_loss_coeff": self.z_loss_coeff or None,
            "moe_shared_expert_overlap": self.shared_expert_overlap,
        }


@dataclass(frozen=True)
class Fp8Options:
    """FP8 of Transformer Engine's linear layers.

    Attributes:
        key: the recipe's key of the format, for messages.
        format: Megatron-Core's field `fp8`.
        recipe: Megatron-Core's field `fp8_recipe`.
    """

    key: str
    format: Fp8Format
    recipe: Fp8Recipe = "delayed"


@dataclass(frozen=True)
class ModuleOptions:
    """Options of Megatron-Core's modules; see the attributes' classes.

    Attributes:
        fusions: which fused kernels are requested.
        experts: how mixtures of experts are computed.
        fp8: None to compute in the model's dtype.
        extra: further fields of Megatron-Core's configuration.
        is_trained: whether the model has gradients.
        freezes_routers: whether the routers of a model that is trained keep their weights.
    """

    fusions: FusionSwitches = field(default_factory=FusionSwitches)
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    fp8: Fp8Options | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    is_trained: bool = True
    freezes_routers: bool = False

    @classmethod
    def of_student(cls, section: MegatronSection) -> ModuleOptions:
        """Return the student's."""
        fp8 = section.fp8_format
        return cls(
            fusions=_switches(section),
            experts=_experts(section, section.moe_z_loss_coeff),
            fp8=None if fp8 is None else Fp8Options("megatron.fp8_format", fp8, section.fp8_recipe),
            extra=section.megatron_extra_kwargs,
            freezes_routers=section.freeze_moe_router,
        )

    @classmethod
    def of_teacher(cls, section: MegatronSection, fp8: Fp8Options | None = None) -> ModuleOptions:
        """Return those of a model that is not trained."""
        return cls(_switches(section), _experts(section, None), fp8, is_trained=False)


def _switches(section: MegatronSection) -> FusionSwitches:
    return FusionSwitches(
        gradient_accumulation_fusion=section.gradient_accumulation_fusion,
        masked_softmax_fusion=section.masked_softmax_fusion,
        bias_swiglu_fusion=section.bias_swiglu_fusion,
        apply_rope_fusion=section.apply_rope_fusion,
        moe_permute_fusion=section.moe_permute_fusion,
    )


def _experts(section: MegatronSection, z_loss_coeff: float | None) -> ExpertOptions:
    return ExpertOptions(
        token_dispatcher=section.moe_token_dispatcher_type,
        grouped_gemm=section.moe_grouped_gemm,
        router_dtype=section.moe_router_dtype,
        z_loss_coeff=z_loss_coeff,
        shared_expert_overlap=section.moe_shared_expert_overlap,
    )
