"""A run that trains adapters is saved without its base, and goes on bit by bit; under another layout, to rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from layouts import CP2, EP2, PP2, SP, TP2
from training.checkpointing.test_resume import build_run, model_of, resume, train_and_save, with_dtype

from megatron_gkd.errors import RunStopped

VPP2 = {"virtual_pipeline_model_parallel_size": 2}
LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0}
DROPOUT = LORA | {"lora_dropout": 0.1}
EMA = {"teacher": {"teacher_kind": "self", "teacher_model": None, "teacher_ema": 0.6}}
LAST_STAGE = LORA | {"target_regex": r"model\.layers\.[23]\..*"}
ONE_LAYER = LORA | {"lora_rank": 1, "target_regex": r"model\.layers\.0\.self_attn\.o_proj"}
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"parallel": TP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2xVPP2": (2, {"parallel": PP2 | VPP2}),
    "CP2": (2, {"parallel": CP2}),
    "DP2": (2, {}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "DP4, one rank without parameters": (4, {"lora": ONE_LAYER}),
    "EP2": (2, {"parallel": EP2}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "PP2xEP2": (4, {"parallel": PP2 | EP2}),
    "PP2, EMA": (2, {"parallel": PP2} | EMA),
    "TP2, EMA": (2, {"parallel": TP2} | EMA),
    "TP2, last layers": (2, {"parallel": TP2, "lora": LAST_STAGE}),
    "PP2, last layers": (2, {"parallel": PP2, "lora": LAST_STAGE}),
    "PP2, last layers, optimizer not distributed": (
        2,
        {"parallel": PP2 | {"distributed_optimizer": False}, "lora": LAST_STAGE},
    ),
}


def arguments(layout, dtype, keys=LORA):
    size, changes = LAYOUTS[layout]
    changes = {"lora": keys} | changes | with_dtype(dtype)
    changes["train"] = changes["train"] | {"lr": 1e-2}
    return size, (model_of(changes), changes)


@pytest.fixture(scope="module")
def saved_run(gloo_world, tmp_path_factory):
    """`saved_run(layout, dtype)`: the folder of a run that was saved once, and what its later steps gave each rank."""

    @functools.cache
    def of(layout, dtype, has_dropout=False):
        size, of_run = arguments(layout, dtype, DROPOUT if has_dropout else LORA)
        directory = tmp_path_factory.mktemp("checkpoints")
        return directory, gloo_world(size).run(train_and_save, *of_run, directory)

    return of


SAME = [
    ("one process", "fp32", False), ("TP2+SP", "fp32", True), ("PP2xVPP2", "bf16", True), ("DP2", "fp32", False),
    ("DP2, overlapped", "fp32", False), ("DP2, optimizer not distributed", "bf16", False),
    ("DP4, one rank without parameters", "fp32", False), ("TP2+SPxEP2", "bf16", False), ("PP2, EMA", "fp32", False),
    ("PP2, last layers", "fp32", False), ("PP2, last layers, optimizer not distributed", "fp32", False),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "dtype", "has_dropout"), SAME)
def test_the_same_layout_resumes_bit_for_bit(layout, dtype, has_dropout, gloo_world, saved_run):
    directory, expected_of_ranks = saved_run(layout, dtype, has_dropout)
    size, of_run = arguments(layout, dtype, DROPOUT if has_dropout else LORA)
    found_of_ranks = gloo_world(size).run(resume, *of_run, directory)
    for expected, found in zip(expected_of_ranks, found_of_ranks, strict=True):
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
        assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


OTHERS = [
    ("TP2", "PP2xVPP2"), ("one process", "TP2+SP"), ("DP2", "CP2"), ("DP2", "one process"), ("TP2+SPxEP2", "EP2"),
    ("EP2", "PP2xEP2"), ("TP2, EMA", "PP2, EMA"), ("TP2, last layers", "PP2, last layers"),
    ("PP2, last layers", "TP2, last layers"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "other"), OTHERS)
def test_another_layout_resumes_up_to_rounding(layout, other, gloo_world, saved_run):
    directory, (expected, *_) = saved_run(layout, "fp32")
    size, (_, changes) = arguments(other, "fp32")
    model = arguments(layout, "fp32")[1][0]
    found, *_ = gloo_world(size).run(resume, model, changes, directory)
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= 1e-6 * tensor.norm(), name


def test_only_adapters_and_their_optimizer_state_are_saved(saved_run):
    """Three numbers to a parameter in fp32: the weight, and two moments. The distributed optimizer adds a copy."""
    directory, ((_, weights, moments), *_) = saved_run("one process", "fp32")
    size = sum(path.stat().st_size for path in directory.rglob("*.distcp"))
    numbers = sum(tensor.numel() for tensor in moments if tensor.dim()) // 2
    assert numbers < 0.3 * sum(tensor.numel() for tensor in weights.values())
    assert 4 * 4 * numbers <= size < 4 * 4 * numbers + 400_000, "files have headers for each tensor"


def adapters_loaded_by(rank, world_size, model, changes, directory, loading):
    """The adapters of a new student after `loading`, a function of the loader."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing import loader
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder

    student, _, saved, _ = build_run(model, changes)
    path, _ = loader.newest_intact(CheckpointFolder(directory))
    getattr(loader, loading)(saved, path, *([1] if loading == "load" else []))
    found = {name: tensor.clone() for name, tensor in student.model.adapter_tensors()}
    destroy_mesh()
    return found


def test_a_new_run_starts_with_the_adapters_of_another(gloo_world, saved_run):
    """Recipe key `train.init_from`: bit by bit, under any layout."""
    directory, _ = saved_run("one process", "fp32")
    (resumed,) = gloo_world(1).run(adapters_loaded_by, *arguments("one process", "fp32")[1], directory, "load")
    assert any(tensor.any() for name, tensor in resumed.items() if "lora_B" in name)
    size, of_run = arguments("TP2+SP", "fp32")
    for found in gloo_world(size).run(adapters_loaded_by, *of_run, directory, "load_weights"):
        assert all(torch.equal(found[name], tensor) for name, tensor in resumed.items())


def resume_as_another_kind(rank, world_size, model, changes, directory):
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load, load_weights, newest_intact

    _, _, saved, _ = build_run(model, changes)
    path, _ = newest_intact(CheckpointFolder(directory))
    messages = []
    for attempt in (lambda: load(saved, path, step=1), lambda: load_weights(saved, path)):
        with pytest.raises(RunStopped) as error:
            attempt()
        messages.append(str(error.value))
    destroy_mesh()
    return path, messages


def test_a_checkpoint_of_adapters_is_refused_by_a_run_of_all_parameters(gloo_world, saved_run):
    directory, _ = saved_run("one process", "fp32")
    model, changes = arguments("one process", "fp32")[1]
    ((path, messages),) = gloo_world(1).run(resume_as_another_kind, model, changes | {"lora": None}, directory)
    holds, trains = "of adapters (tuner_type = lora)", "of all parameters (tuner_type = full)"
    assert messages == [f"{path}: a checkpoint {holds}; this run trains those {trains}"] * 2
