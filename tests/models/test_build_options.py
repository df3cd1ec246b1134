"""The configuration of Megatron-Core that a recipe's options make, where the kernels are only pretended to be there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checkpoints import tiny_checkpoint

from megatron_gkd.config.megatron_fields import REFUSED
from megatron_gkd.config.schema import MegatronSection
from megatron_gkd.errors import UserError


def config_of(family="qwen3", section: dict | None = None, dtype=torch.bfloat16, layout=None, **options):
    """Return the configuration of a student of a family."""
    from megatron_gkd.models.build_options import BuildOptions, build_config
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.module_options import ModuleOptions
    from megatron_gkd.runtime.mesh import Layout

    modules = ModuleOptions.of_student(MegatronSection.model_validate(section or {}))
    checkpoint = Checkpoint.open(str(tiny_checkpoint(family, **options)))
    return build_config(checkpoint, Layout(**(layout or {})), BuildOptions(dtype=dtype, modules=modules))


def in_world(rank, world_size, arguments, pretended):
    """Return the fields of the configuration that `config_of` makes in an initialized world."""
    from megatron_gkd.models import fp8, fusions
    from megatron_gkd.runtime import portability
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    initialize_mesh(Layout(), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        if "transformer_engine" in pretended:
            for module in (fp8, fusions):
                patch.setattr(module, "is_real", lambda: True)
        if "gpu" in pretended:
            patch.setattr(portability, "compute_capability", lambda: pretended["gpu"])
        try:
            config = config_of(**arguments)
        finally:
            destroy_mesh()
    simple = (int, float, str, bool, type(None))
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if isinstance(value := getattr(config, field.name), simple)
    }


@pytest.fixture
def fields(gloo_world):
    def of(arguments: dict, **pretended):
        return gloo_world(1).run(in_world, arguments, pretended)[0]

    return of


FUSIONS = ("gradient_accumulation_fusion", "masked_softmax_fusion", "bias_activation_fusion", "apply_rope_fusion")


def test_defaults_without_kernels(fields):
    found = fields({"family": "qwen3_moe"})
    assert not any(found[name] for name in (*FUSIONS, "moe_permute_fusion"))
    assert (found["moe_token_dispatcher_type"], found["moe_grouped_gemm"]) == ("alltoall", True)
    assert (found["moe_router_dtype"], found["moe_z_loss_coeff"], found["fp8"]) == ("fp32", None, None)


def test_auto_uses_what_is_there(fields):
    found = fields({}, transformer_engine=True)
    assert found["gradient_accumulation_fusion"] and not found["masked_softmax_fusion"]
    assert not found["bias_activation_fusion"], "there is no GPU to compile for"
    assert not fields({"section": {"gradient_accumulation_fusion": "off"}}, transformer_engine=True)[FUSIONS[0]]


def test_fp8(fields):
    section = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
    found = fields({"section": section}, transformer_engine=True, gpu=(9, 0))
    assert (found["fp8"], found["fp8_recipe"], found["fp8_param"]) == ("hybrid", "tensorwise", False)


@pytest.mark.parametrize(
    ("arguments", "pretended", "problem"),
    [
        ({}, {}, "megatron.fp8_format = hybrid: needs Transformer Engine and a GPU of compute capability 8.9 or "
         "higher, which are not here; leave it out to compute in train.dtype"),
        ({"section": {"fp8_recipe": "mxfp8"}}, {"gpu": (9, 0)}, "needs Transformer Engine and a GPU of compute "
         "capability 10.0 or higher for the recipe mxfp8; this one has 9.0"),
        ({"dtype": torch.float32}, {"gpu": (9, 0)}, "needs train.dtype = bf16"),
        ({"intermediate_size": 40}, {"gpu": (9, 0)},
         "the feed-forward size of the model = 40 on each rank; FP8 needs a multiple of 16"),
        ({"section": {"fp8_recipe": "mxfp8"}}, {"gpu": (10, 0)},
         "the feed-forward size of the model = 48 on each rank; FP8 needs a multiple of 32"),
        ({"family": "qwen3_moe", "moe_intermediate_size": 32, "layout": {"tensor": 2, "expert_tensor": 4}},
         {"gpu": (9, 0)}, "the experts' size of the model = 8 on each rank; FP8 needs a multiple of 16"),
        ({"head_dim": 8, "layout": {"tensor": 4}, "intermediate_size": 64}, {"gpu": (9, 0)},
         "the size of all attention heads of the model = 8 on each rank; FP8 needs a multiple of 16"),
    ],
)  # fmt: skip
def test_fp8_is_refused(arguments, pretended, problem, fields):
    arguments = arguments | {"section": {"fp8_format": "hybrid"} | arguments.get("section", {})}
    if pretended:
        pretended = pretended | {"transformer_engine": True}
    with pytest.raises(UserError) as error:
        fields(arguments, **pretended)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"gradient_accumulation_fusion": "on"},
            "gradient_accumulation_fusion = on: needs Transformer Engine or Apex'",
        ),
        ({"apply_rope_fusion": "on"}, "megatron.apply_rope_fusion = on: needs Transformer Engine"),
        ({"megatron_extra_kwargs": {"bf16": True}}, "bf16 = true: is decided by train.dtype"),
        ({"megatron_extra_kwargs": {"moe_router_fusion": 1}}, "moe_router_fusion = 1: must be true or false"),
    ],
)
def test_what_the_checks_refuse_is_refused_here_too(section, problem, fields):
    with pytest.raises(UserError) as error:
        fields({"section": section})
    assert problem in str(error.value)


def test_further_fields_are_passed_on(fields):
    extra = {"moe_input_jitter_eps": 0.01, "persist_layer_norm": False}
    found = fields({"family": "qwen3_moe", "section": {"megatron_extra_kwargs": extra}})
    assert {name: found[name] for name in extra} == extra


def test_fields_that_checkpoints_and_recipes_decide_are_refused_as_further_ones():
    """Of every family: none of them can be set in two places."""
    from families.text import CASES, tiny_family

    from megatron_gkd.config.megatron_fields import field_types
    from megatron_gkd.models.build_options import hf_to_mcore_config
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.family_settings import family_settings

    decided = set()
    for case in CASES:
        checkpoint = Checkpoint.open(str(tiny_family(case.name)))
        decided |= hf_to_mcore_config(checkpoint.config).keys() | family_settings(checkpoint).keys()
    assert decided & field_types().keys() <= REFUSED.keys() | {
        "bias_dropout_fusion"
    }  # of some families, and refused for these
