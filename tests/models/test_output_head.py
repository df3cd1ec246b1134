"""How heads scale and bound their logits: the meaning of config.json's keys in transformers, and who reads which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name

from megatron_gkd.checkpoint_format.families import FAMILIES
from megatron_gkd.checkpoint_format.output_head import (
    HEAD_KEYS,
    HeadScaling,
    read_head_scaling,
    wrong_head_scaling,
)
from megatron_gkd.ops import reference

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


IMPLEMENTED_AS = {"kimi_k2": "deepseek_v3"}
"""Families that transformers has no module for, and those that they are."""


@pytest.mark.parametrize(
    ("model_type", "value", "expected"),
    [
        ("granite", {"logits_scaling": 8.0}, HeadScaling(scale=0.125)),
        ("cohere", {"logit_scale": 0.25}, HeadScaling(scale=0.25)),
        ("cohere", {}, HeadScaling(scale=0.0625)),
        ("gemma2", {"final_logit_softcapping": 0.5}, HeadScaling(softcap=0.5)),
        ("gemma2", {}, HeadScaling(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, HeadScaling()),
        ("gemma3_text", {"final_logit_softcapping": 0.5}, HeadScaling(softcap=0.5)),
        ("phi", {}, HeadScaling()),
    ],
)
def test_keys_mean_what_transformers_makes_of_them(model_type, value, expected):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **value)
    scaling = read_head_scaling(config.to_dict(), HEAD_KEYS)
    assert scaling == expected
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    bias = model.lm_head.bias
    assert (bias is not None) == (model_type == "phi")
    if bias is not None:
        torch.nn.init.normal_(bias)
    ids = torch.randint(50, (1, 9))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        found = reference.logits(hidden, model.lm_head.weight, bias=bias, **vars(scaling))
        torch.testing.assert_close(found, model(ids).logits)


def test_every_family_names_the_keys_that_its_implementation_reads():
    folder = Path(transformers.__file__).parent / "models"
    for model_type, family in FAMILIES.items():
        module = IMPLEMENTED_AS.get(model_type, model_type_to_module_name(model_type))
        source = (folder / module / f"modeling_{module}.py").read_text(encoding="utf-8")
        read = {key for key in HEAD_KEYS if re.search(rf"\.{key}\b", source)}
        assert read == set(family.head_keys), model_type


def test_keys_that_a_family_does_not_read_have_no_effect():
    assert read_head_scaling({"final_logit_softcapping": 3.0, "logit_scale": 2.0}, ()) == HeadScaling()
    assert list(wrong_head_scaling({"logit_scale": -2.0}, ())) == []


@pytest.mark.parametrize("value", [0, -1.0, True, "30", float("inf")])
def test_a_value_that_is_no_positive_number_is_refused(value):
    (problem,) = wrong_head_scaling({"final_logit_softcapping": value}, HEAD_KEYS)
    assert problem.startswith("its config.json has final_logit_softcapping = ")
    assert problem.endswith(": must be a positive number or null")
