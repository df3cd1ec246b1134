"""Parts of a multimodal student that are not trained, and parts with learning rates of their own."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from layouts import PP2, SP, TP2
from safetensors.torch import load_file
from training_layouts import TOLERANCE
from vision.vision_rows import TEXT_SPECS
from vision.vision_runs import TRAINED, assert_equal_runs, build, merged, train_steps
from vision_checkpoints import tiny_vision_checkpoint

PARTS = ("vit", "aligner", "llm")
RATES = {"train": {"vit_lr": 3e-2, "aligner_lr": 1e-3, "min_lr": 1e-3, "lr_decay_style": "linear"}}
# trained parts: processes and the layout in which they are compared with one process
TRAINED_PARTS = {
    ("llm",): (2, {"parallel": TP2 | SP}),
    ("vit", "aligner"): (2, {"parallel": PP2}),  # the last stage trains nothing
    ("aligner",): (2, {}),
    ("aligner", "llm"): (2, {"parallel": PP2 | {"distributed_optimizer": False}}),
}


def student():
    return tiny_vision_checkpoint("qwen2_5_vl", seed=2)


def training(*parts: str) -> dict:
    return {"train": {f"freeze_{part}": part not in parts for part in PARTS}}


def part_of(name: str) -> str:
    if "visual." not in name:
        return "llm"
    return "aligner" if ".merger." in f".{name}" else "vit"


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(parts: tuple[str, ...]):
        return gloo_world(1).run(train_steps, student(), None, training(*parts))[0]

    return of


@pytest.mark.parametrize("parts", TRAINED_PARTS, ids="+".join)
def test_only_the_other_parts_are_trained(parts, gloo_world, one_process):
    records, weights = one_process(parts)
    initial = load_file(student() / "model.safetensors")
    complete = one_process(PARTS)[0][0]["gradient"]
    assert weights.keys() == initial.keys()
    for name, weight in weights.items():
        if part_of(name) in parts:
            assert not torch.equal(weight, initial[name]), name
            first = records[0]["gradient"][name]
            assert (first - complete[name]).norm() <= TOLERANCE * complete[name].norm(), name
        else:
            assert torch.equal(weight, initial[name]), name
    size, changes = TRAINED_PARTS[parts]
    found = gloo_world(size).run(train_steps, student(), None, merged(training(*parts), changes))
    assert_equal_runs(found[0], (records, weights))


def test_tower_and_aligner_are_frozen_by_default(gloo_world, one_process):
    found = gloo_world(1).run(train_steps, student(), None, {})[0]
    assert all(torch.equal(weight, one_process(("llm",))[1][name]) for name, weight in found[1].items())


@pytest.mark.parametrize("layout", [{}, {"parallel": PP2}], ids=["DP2", "PP2"])
def test_rates_are_the_parts_own(layout, gloo_world):
    changes = merged(TRAINED, RATES)
    expected = gloo_world(1).run(train_steps, student(), None, changes)[0]
    found = gloo_world(2).run(train_steps, student(), None, merged(changes, layout))[0]
    assert_equal_runs(found, expected)
    rates = gloo_world(1).run(rates_of_steps, student(), changes)[0]
    base = [0.01, 0.007, 0.004, 0.001]
    assert rates == [
        {"vit": pytest.approx(3 * rate), "aligner": pytest.approx(rate / 10), "llm": pytest.approx(rate)}
        for rate in base
    ]
    assert [record["learning_rate"] for record in found[0]] == pytest.approx(base[1:])


def rates_of_steps(rank, world_size, path, changes):
    """Return the learning rate of each part before every step and after the last."""
    from megatron_gkd.models.vision.parts import named_parts
    from megatron_gkd.runtime.mesh import destroy_mesh

    built, _, steps = build(path, None, changes)
    part_of_parameter = {id(parameter): part for chunk in built.chunks for part, parameter in named_parts(chunk)}
    rates = []
    for microbatches in [*steps, None]:
        rates.append(_rates(built.optimizer, part_of_parameter))
        if microbatches is not None:
            built.compute_gradients(microbatches, [None] * len(microbatches))
            built.update()
    destroy_mesh()
    return rates


def _rates(optimizer, part_of_parameter) -> dict[str, float]:
    found: dict[str, set[float]] = {}
    distributed = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    for parameter, (group, _) in distributed.model_param_group_index_map.items():
        rate = distributed.optimizer.param_groups[group]["lr"]
        found.setdefault(part_of_parameter[id(parameter)], set()).add(rate)
    return {part: rate for part, (rate,) in found.items()}


def test_text_alone_trains_the_language_model_alone(gloo_world):
    records, _ = gloo_world(1).run(train_steps, student(), None, TRAINED, specs=TEXT_SPECS)[0]
    for name, gradient in records[0]["gradient"].items():
        assert bool(gradient.any()) == (part_of(name) == "llm"), name


def test_recomputing_the_tower_gives_the_same_gradients(gloo_world, one_process):
    changes = merged(TRAINED, {"train": {"vit_gradient_checkpointing": True}})
    records = gloo_world(1).run(recomputed_run, student(), changes)[0]
    assert_equal_runs(records, one_process(PARTS), tolerance=1e-6)


def recomputed_run(rank, world_size, path, changes):
    """Train three steps, and assert that the tower's layers are computed twice in each."""
    from megatron_gkd.models.megatron_model import MegatronModel

    calls = []
    load = MegatronModel.load.__func__

    def counting(cls, *arguments, **options):
        model = load(cls, *arguments, **options)
        block = model.chunks[0].visual.visual.blocks[0].attn.qkv
        block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        return model

    MegatronModel.load = classmethod(counting)
    try:
        result = train_steps(rank, world_size, path, None, changes)
    finally:
        MegatronModel.load = classmethod(load)
    assert len(calls) == 2 * 12
    return result


@pytest.mark.parametrize("family", ["qwen2_5_vl_tied", "internvl", "qwen3_vl"])
def test_the_parts_are_counted(family):
    """The report of the start has no model of its own: it goes by the names of the checkpoint's tensors."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.vision.parts import count_parameters_of

    from mcore_bridge.model.register import get_mcore_model_type, get_model_meta

    checkpoint = Checkpoint.open(str(tiny_vision_checkpoint(family, seed=2)))
    visual_class = get_model_meta(get_mcore_model_type(checkpoint.config.model_type)).visual_cls
    arguments = visual_class, checkpoint.parameter_shapes, checkpoint.num_parameters
    vit, aligner, llm = (count_parameters_of({part}, *arguments) for part in PARTS)
    assert min(vit, aligner, llm) > 0 and vit + aligner + llm == checkpoint.num_parameters
    sizes = {name: math.prod(shape) for name, shape in checkpoint.parameter_shapes.items()}
    of_aligner = sum(size for name, size in sizes.items() if "merger" in name or "multi_modal" in name)
    of_tower = sum(size for name, size in sizes.items() if "visual." in name or "vision_tower." in name)
    assert aligner == of_aligner and vit + aligner == of_tower + (of_aligner if family == "internvl" else 0)
    assert count_parameters_of({"llm"}, None, {}, 7) == 7
