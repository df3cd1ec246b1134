"""Exports of a model with adapters, from every layout: PEFT adapters, merged weights and base weights."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpoints import tiny_checkpoint
from logits import logits_of_megatron, logits_of_transformers, relative_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TP2_SP = {"tensor": 2, "sequence_parallel": True}
VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
RULES = {
    "all": {},
    "ranks of their own, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.2\.self_attn\..*": 2, "down_proj": 6},
        "alpha_pattern": {"o_proj": 3},
    },
    "half of the layers": {"target_regex": r"model\.layers\.[02]\..*"},
}
CASES = {  # model, layouts by processes, rules
    "tied": ("qwen3_tied", {"one process": (1, {}), "TP2+SP": (2, TP2_SP), "PP2xVPP2": (2, VPP2)}, "all"),
    "untied": ("llama", {"one process": (1, {}), "PP2": (2, {"pipeline": 2})}, "all"),
    "mixture": (
        "qwen3_moe",
        {"one process": (1, {}), "TP2+SPxEP2": (2, TP2_SP | {"expert": 2}), "PP2": (2, {"pipeline": 2})},
        "all",
    ),
    "mixture, rsLoRA": ("qwen3_moe", {"one process": (1, {}), "EP2": (2, {"expert": 2})}, "rsLoRA"),
    "patterns": ("qwen3_tied", {"one process": (1, {}), "PP2": (2, {"pipeline": 2})}, "ranks of their own, rsLoRA"),
    "some": ("qwen3_tied", {"one process": (1, {}), "PP2": (2, {"pipeline": 2})}, "half of the layers"),
}
RULES["rsLoRA"] = {"use_rslora": True}
PROMPTS = [[5, 9, 33, 7], [60, 3], [11, 12, 13, 14, 15, 16, 17]]
NUM_TOKENS = 8


def open_model(path, layout, rules=None, **options):
    """`rules`: of the adapters; None: a model without."""
    from megatron_gkd.checkpoint_format.lora_layers import LayerRules
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.lora.options import LoraOptions
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    lora = None
    if rules is not None:
        lora = LoraOptions(LayerRules(rank=4, alpha=8, **rules), **options)
    options = BuildOptions(virtual_pipeline=layout.get("virtual_pipeline"), lora=lora)
    return MegatronModel.load(Checkpoint.open(str(path)), mesh, options)


def exported(rank, world_size, path, layout, rules, folder):
    """Adapters and merged checkpoint into `folder`. Returns logits and greedy tokens, with adapters and without."""
    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh

    model = open_model(path, layout, rules, b_std=0.05, seed=3)
    export_adapters(model, folder / "adapters")
    export_checkpoint(model, folder / "merged")
    base = {name: tensor.clone() for name, tensor in model.base_tensors()}
    merged = {name: tensor.clone() for name, tensor in model.named_tensors()}
    engine = MegatronEngine(model, [2])
    sampling = Sampling(max_completion_length=NUM_TOKENS, temperature=0, ignore_eos=True)
    tokens = [one.token_ids for one in engine.generate(PROMPTS, sampling, [0] * len(PROMPTS))]
    logits = logits_of_megatron(model)
    with model.adapters_disabled():
        without = logits_of_megatron(model)
    assert torch.equal(logits, logits_of_megatron(model)) if logits is not None else logits_of_megatron(model) is None
    destroy_mesh()
    plain = open_model(path, layout)
    plain_logits = logits_of_megatron(plain)
    assert (without is None and plain_logits is None) or torch.equal(without, plain_logits)
    destroy_mesh()
    return {"logits": logits, "tokens": tokens, "base": base, "merged": merged}


def loaded(rank, world_size, path, layout, rules, adapters):
    """The factors of a model that begins with the adapters in a folder."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    model = open_model(path, layout, rules, adapters=adapters)
    factors = {name: tensor.clone() for name, tensor in model.adapter_tensors()}
    destroy_mesh()
    return factors


@pytest.fixture(scope="module")
def exports(gloo_world, tmp_path_factory):
    @functools.cache
    def of(case, layout):
        family, layouts, rules = CASES[case]
        size, layout = layouts[layout]
        folder, path = tmp_path_factory.mktemp("exports"), tiny_checkpoint(family, seed=2)
        results = gloo_world(size).run(exported, path, layout, RULES[rules], folder)
        return path, folder, results

    return of


OTHERS = [(case, layout) for case, (_, layouts, _) in CASES.items() for layout in layouts if layout != "one process"]


@pytest.mark.parametrize(("case", "layout"), OTHERS)
def test_all_layouts_write_the_same_bits(case, layout, exports):
    (_, one, (expected,)), (path, other, results) = exports(case, "one process"), exports(case, layout)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_model.json"):
        assert (one / "adapters" / name).read_bytes() == (other / "adapters" / name).read_bytes(), name
    stored = load_file(path / "model.safetensors")
    for found in results:
        assert found["base"].keys() == stored.keys() == found["merged"].keys()
        assert all(torch.equal(found["base"][name], tensor) for name, tensor in stored.items())
        assert all(torch.equal(found["merged"][name], tensor) for name, tensor in expected["merged"].items())
    assert not all(torch.equal(expected["merged"][name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("case", CASES)
def test_transformers_and_peft_compute_the_same(case, exports):
    from peft import PeftModel

    path, folder, _ = exports(case, "one process")
    expected = logits_of_transformers(path, folder / "adapters")
    assert relative_error(logits_of_transformers(path), expected) > 1e-2, "the adapters must show"
    assert relative_error(logits_of_transformers(folder / "merged"), expected) < 1.2e-6
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapters").eval()
    greedy = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}
    tokens = [
        model.generate(input_ids=torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist() for prompt in PROMPTS
    ]
    for layout in CASES[case][1]:
        for found in exports(case, layout)[2]:
            assert found["tokens"] == tokens
            if found["logits"] is not None:
                assert relative_error(found["logits"], expected) < 1.2e-6


THIRD = {
    "tied": ("PP2xVPP2", (2, {"tensor": 2})),
    "mixture": ("TP2+SPxEP2", (2, {"pipeline": 2})),
    "patterns": ("PP2", (2, {"tensor": 2})),
}


@pytest.mark.parametrize("case", THIRD)
def test_adapters_are_read_under_another_layout(case, exports, gloo_world):
    layout, (size, third) = THIRD[case]
    path, folder, _ = exports(case, layout)
    written = load_file(folder / "adapters/adapter_model.safetensors")
    for found in gloo_world(size).run(loaded, path, third, RULES[CASES[case][2]], folder / "adapters"):
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
