"""Compare the experts' load-balancing loss with plain transformers: a microbatch weighs by its share of labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checkpoints import tiny_checkpoint
from layouts import MOE
from rows import RandomRows
from training_layouts import RECIPE, train_steps
from transformers import AutoModelForCausalLM

from megatron_gkd.data.order import SampleOrder

COEFFICIENT = 0.7
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def balancing_loss(logits: torch.Tensor, k: int) -> torch.Tensor:
    """E · Σ f_i P_i of one layer's router logits [T, E] (Switch Transformer, arXiv:2101.03961, equation 4)."""
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0)
    return logits.shape[1] * ((chosen.sum(0) / (len(logits) * k)) * probabilities.mean(0)).sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean of the squared logarithms of the partition function of one layer's router logits [T, E] (ST-MoE)."""
    return logits.logsumexp(-1).square().mean()


def gradients_of_transformers(path, rows: RandomRows, z_coefficient: float = 0.0) -> dict[str, torch.Tensor]:
    """Of the first step, one row a microbatch: cross-entropy, and each row's losses of routers by its share of labels.

    These are the balancing loss and, with a coefficient, the z-loss.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **EAGER).train()
    routed = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, args: routed.append(F.linear(args[0].reshape(-1, args[0].shape[-1]), gate.weight))
        )
    order = SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True)
    samples = [rows[row] for row in order.rows_of_step(1, RECIPE["train"]["global_batch_size"])]
    labels = [torch.from_numpy(sample.labels) for sample in samples]
    total = sum(int((one != -100).sum()) for one in labels)
    loss = 0.0
    for sample, one in zip(samples, labels, strict=True):
        routed.clear()
        logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0]
        loss = loss + F.cross_entropy(logits, one, ignore_index=-100, reduction="sum") / total
        balance = sum(balancing_loss(layer, model.config.num_experts_per_tok) for layer in routed)
        balance = COEFFICIENT * balance + z_coefficient * sum(map(z_loss, routed))
        loss = loss + balance * int((one != -100).sum()) / total
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def changes(layout: str = "") -> dict[str, dict]:
    section = {"teacher": {"teacher_kind": "none", "teacher_model": None}, "train": {"moe_aux_loss_coeff": COEFFICIENT}}
    return section | (MOE[layout][1] if layout else {})


@pytest.mark.parametrize("most_labels", [None, 2])
@pytest.mark.parametrize("layout", ["", "TP2+SP", "CP2xEP2"])
def test_it_counts_by_labels_however_long_the_prompts_are(layout, most_labels, gloo_world):
    model = tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    rows = RandomRows(count=24, most_labels=most_labels)
    world = gloo_world(MOE[layout][0] if layout else 1)
    found = world.run(train_steps, model, None, changes(layout), rows=rows)[0][0]["gradient"]
    expected = gradients_of_transformers(model, rows)
    routers = [name for name in expected if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    for name in routers:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("most_labels", [None, 2])
@pytest.mark.parametrize("layout", ["", "TP2+SP", "CP2xEP2", "PP2xEP2"])
def test_the_z_loss_counts_by_labels_too(layout, most_labels, gloo_world):
    model = tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    rows = RandomRows(count=24, most_labels=most_labels)
    world = gloo_world(MOE[layout][0] if layout else 1)
    recipe = changes(layout) | {"megatron": {"moe_z_loss_coeff": 0.3}}
    found = world.run(train_steps, model, None, recipe, rows=rows)[0][0]["gradient"]
    expected, without = gradients_of_transformers(model, rows, 0.3), gradients_of_transformers(model, rows)
    for name in (name for name in expected if name.endswith("mlp.gate.weight")):
        assert (expected[name] - without[name]).norm() > 0.1 * expected[name].norm()
        assert (found[name] - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_recomputed_layers_have_the_weight_of_their_own_microbatch(gloo_world):
    """In a pipeline, another microbatch's forward pass comes before the recomputation."""
    model = tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    rows = RandomRows(count=24)
    parallel = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    plain = gloo_world(1).run(train_steps, model, None, changes(), rows=rows)[0][0]["gradient"]
    recipe = changes() | {"parallel": parallel | {"pipeline_model_parallel_size": 2}}
    found = gloo_world(2).run(train_steps, model, None, recipe, rows=rows)[0][0]["gradient"]
    for name, gradient in plain.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name} is off by {error:.1e}"
