"""The layers that get adapters, with their ranks and scales, by name."""

from __future__ import annotations

import pytest

from megatron_gkd.checkpoint_format.lora_layers import LayerRules, LoraProblem, layers_of_shape

DENSE, MIXTURE = layers_of_shape(3, 0), layers_of_shape(3, 4)
JOINED = "q_proj, k_proj and v_proj are one matrix in Megatron-Core (linear_qkv) and share one A; name all of them or "
JOINED += "none"
KNOWN = "all-linear, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, linear_qkv, linear_proj, "
KNOWN += "linear_fc1, linear_fc2"


def chosen(layers, *targets, **rules) -> set[str]:
    if targets:
        rules["target_modules"] = targets
    return {layer.base.name.removeprefix("decoder.layers.") for layer in LayerRules(**rules).choose(layers)}


def parts(*names: str, layers=range(3)) -> set[str]:
    return {f"{number}.{name}" for number in layers for name in names}


ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")


@pytest.mark.parametrize(
    ("layers", "targets", "expected"),
    [
        (DENSE, ["all-linear"], parts(*ATTENTION, "mlp.linear_fc1", "mlp.linear_fc2")),
        (MIXTURE, ["all-linear"], parts(*ATTENTION, "mlp.experts.linear_fc1", "mlp.experts.linear_fc2")),
        (DENSE, ["q_proj", "k_proj", "v_proj"], parts("self_attention.linear_qkv")),
        (DENSE, ["linear_qkv", "o_proj"], parts(*ATTENTION)),
        (DENSE, ["gate_proj", "up_proj"], parts("mlp.linear_fc1")),
        (DENSE, ["self_attn.o_proj"], parts("self_attention.linear_proj")),
        (DENSE, ["model.layers.1.mlp.down_proj"], parts("mlp.linear_fc2", layers=[1])),
        (DENSE, ["decoder.layers.2.mlp.linear_fc2"], parts("mlp.linear_fc2", layers=[2])),
        (MIXTURE, ["experts"], parts("mlp.experts.linear_fc1", "mlp.experts.linear_fc2")),
        (MIXTURE, ["gate_proj", "up_proj"], parts("mlp.experts.linear_fc1")),
        (MIXTURE, ["linear_fc2"], parts("mlp.experts.linear_fc2")),
    ],
)
def test_layers_by_name(layers, targets, expected):
    assert chosen(layers, *targets) == expected


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        (r"model\.layers\.[12]\.mlp\..*", parts("mlp.linear_fc1", "mlp.linear_fc2", layers=[1, 2])),
        (r".*\.linear_qkv", parts("self_attention.linear_qkv")),
        (r".*\.(q|k|v|o)_proj", parts(*ATTENTION)),
    ],
)
def test_regular_expressions(regex, expected):
    assert chosen(DENSE, target_regex=regex) == expected


@pytest.mark.parametrize(
    ("layers", "rules", "problem"),
    [
        (DENSE, {"target_modules": ("q_proj",)}, f"target_modules = [q_proj]: {JOINED}"),
        (DENSE, {"target_modules": ("o_proj", "k_proj")}, f"target_modules = [o_proj, k_proj]: {JOINED}"),
        (DENSE, {"target_regex": r".*q_proj"}, f"target_regex = .*q_proj: {JOINED}"),
        (DENSE, {"target_modules": ("w1",)}, f"target_modules = w1: no layer of the model has this name; use {KNOWN}"),
        (DENSE, {"target_modules": ("experts",)}, "target_modules = experts: no layer of the model has this name; use "
         f"{KNOWN}"),
        (MIXTURE, {"target_modules": ("o_proj", "router")}, "target_modules = router: can't be a target, as adapters "
         "of a router could not be switched off or merged; remove it"),
        (DENSE, {"target_modules": ("lm_head",)}, "target_modules = lm_head: can't be a target, as embeddings and the "
         "LM head take no adapters; remove it"),
        (MIXTURE, {"target_regex": r".*experts\.[01]\..*"}, r"target_regex = .*experts\.[01]\..*: gate_proj and "
         "up_proj of all experts in model.layers.0.mlp.experts are one layer here; name all of them or none"),
        (MIXTURE, {"target_regex": r"decoder\.layers\.[01]\.mlp.*fc1"}, r"target_regex = decoder\.layers\.[01]\.mlp."
         "*fc1: experts are adapted in 2 of 3 layers; PEFT reads those of all layers or of none"),
        (DENSE, {"target_regex": "nothing"}, "target_regex = nothing: no layer of the model has such a name"),
        (DENSE, {"target_regex": "(o_proj"}, "target_regex = (o_proj: not a regular expression (missing ), "
         "unterminated subpattern at position 0)"),
        (DENSE, {"rank_pattern": {"q_proj": 2}}, "rank_pattern = q_proj: q_proj, k_proj and v_proj are one matrix in "
         "Megatron-Core (linear_qkv) and share one A; give all of them the same value"),
        (DENSE, {"rank_pattern": {"w1": 2}}, "rank_pattern = w1: no adapted module has this name; use Hugging Face "
         "names (q_proj)"),
        (DENSE, {"alpha_pattern": {"o_proj": 2}, "target_modules": ("down_proj",)}, "alpha_pattern = o_proj: no "
         "adapted module has this name; use Hugging Face names (q_proj)"),
        (MIXTURE, {"rank_pattern": {"down_proj": 2}}, "rank_pattern = down_proj: matches experts, whose factors PEFT "
         "reads with the same rank and alpha"),
    ],
)  # fmt: skip
def test_impossible_rules_are_refused_by_name(layers, rules, problem):
    with pytest.raises(LoraProblem) as error:
        LayerRules(**rules).choose(layers)
    assert str(error.value) == problem


def test_ranks_and_scales():
    rules = LayerRules(
        rank=4,
        alpha=8,
        rank_pattern={r"layers\.1\.self_attn\..*": 2, "down_proj": 16},
        alpha_pattern={"model.layers.2.self_attn.o_proj": 3},
    )
    found = {layer.base.name.removeprefix("decoder.layers."): layer for layer in rules.choose(DENSE)}
    ranks = {name: layer.rank for name, layer in found.items() if layer.rank != 4}
    assert ranks == {
        "1.self_attention.linear_qkv": 2,
        "1.self_attention.linear_proj": 2,
        **{f"{number}.mlp.linear_fc2": 16 for number in range(3)},
    }
    assert found["0.self_attention.linear_qkv"].scaling == 2
    assert found["1.self_attention.linear_qkv"].scaling == 4
    assert found["2.self_attention.linear_proj"].scaling == 0.75
    (first, *_) = LayerRules(rank=4, alpha=8, use_rslora=True).choose(DENSE)
    assert (first.scaling, first.alpha) == (4, 16), "alpha / sqrt(rank); the plain alpha of the same scale"
