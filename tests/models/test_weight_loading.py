"""Tensors and parameters that mcore-bridge would ignore end the load on all ranks."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoints import tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PP2 = {"pipeline": 2}


def stored_tensors(path, _):
    """As the files have them, whatever config.json says."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: SimpleNamespace(file="model.safetensors", shape=tuple(one.get_shape()))
            for name, one in slices.items()
        }


def load(rank, world_size, path, layout, claimed=()):
    """What each rank raises, or None, for a checkpoint whose files have not been checked.

    The checkpoint says that it has the tensors `claimed`, too.
    """
    from megatron_gkd.errors import UserError
    from megatron_gkd.models import checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    def tensors(*arguments):
        return stored_tensors(*arguments) | dict.fromkeys(claimed, SimpleNamespace(file="none", shape=()))

    checks = {"read_tensors": tensors, "read_config": lambda path: None}
    saved = {name: getattr(checkpoint, name, None) for name in checks}
    vars(checkpoint).update(checks)
    mesh = initialize_mesh(Layout(**layout), seed=1)
    try:
        MegatronModel.load(checkpoint.Checkpoint.open(str(path)), mesh, BuildOptions())
    except UserError as error:
        return str(error)
    finally:
        vars(checkpoint).update(saved)
        destroy_mesh()
    return None


def reads(rank, world_size, path, layout):
    """What this rank prints, once it has loaded a checkpoint, and the counts that it has reported."""
    import contextlib
    import io

    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions
    from megatron_gkd.reporting import phases
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.build import load_model

    mesh, seconds = initialize_mesh(Layout(**layout), seed=1), (phases.ANNOUNCE_AFTER_S, phases.LINE_EVERY_S)
    try:
        phases.ANNOUNCE_AFTER_S = phases.LINE_EVERY_S = 0
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            load_model("the student x", Checkpoint.open(str(path)), mesh, BuildOptions())
    finally:
        phases.ANNOUNCE_AFTER_S, phases.LINE_EVERY_S = seconds
        destroy_mesh()
    return printed.getvalue().splitlines()


@pytest.mark.parametrize(
    ("family", "layout", "reads_all"),
    [
        ("qwen3_tied", {"tensor": 2}, True),
        ("qwen3_moe", {}, True),
        ("qwen3_moe", {"expert": 2}, False),
        ("qwen3", {"pipeline": 2}, False),
    ],
)
def test_progress_counts_the_tensors_that_rank_0_reads(family, layout, reads_all, gloo_world):
    path = tiny_checkpoint(family)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        total = len(file.keys())
    lines, other = gloo_world(2).run(reads, path, layout)
    assert other == [], "rank 1 prints nothing"
    *progress, last = (line for line in lines if line != "Loading the student x ...")
    count = len(progress) - 1  # the first line says 0
    assert count == total if reads_all else 0 < count < total
    of_total = f" of {total}" if reads_all else ""
    for done, line in enumerate(progress):
        assert line.startswith(f"Loading the student x: {done}{of_total} tensors")
    assert last.startswith(f"Loading the student x: {count} tensors in ")


@pytest.fixture
def changed(tmp_path):
    """A copy of a tiny checkpoint with other tensors (None: without it) and other keys of config.json."""

    def of(source, tensors, **config):
        path = tmp_path / "changed"
        shutil.copytree(source, path)
        found = load_file(path / "model.safetensors") | tensors
        save_file({name: x for name, x in found.items() if x is not None}, path / "model.safetensors")
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(written | config))
        return path

    return of


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_a_tensor_that_no_rank_reads_is_an_error(gloo_world, changed):
    names = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(4)]
    path = changed(tiny_checkpoint("llama"), {name: torch.zeros(32) for name in names})
    message = f"{path}: model.safetensors: the model has no parameter for {', '.join(names[:3])} and 1 more tensors"
    assert gloo_world(2).run(load, path, PP2) == [message, message]


def test_a_surplus_layer_is_an_error(gloo_world, changed):
    path = changed(tiny_checkpoint("llama"), {}, num_hidden_layers=2)
    first, second = gloo_world(2).run(load, path, PP2)
    assert first == second and f"{path}: model.safetensors: the model has no parameter for model.layers.2." in first


def test_a_parameter_that_nothing_fills_is_an_error(gloo_world, changed):
    path = changed(tiny_checkpoint("qwen3"), {HEAD: None})
    message = (
        f"{path}: no tensor fills the model's output_layer.weight in rank 1, or all its values in the files are NaN"
    )
    assert gloo_world(2).run(load, path, PP2, [HEAD]) == [message, message]


def test_a_tensor_that_one_rank_misses_is_an_error_on_all(gloo_world, changed):
    path = changed(tiny_checkpoint("qwen3"), {"model.layers.3.self_attn.o_proj.weight": None})
    message = f"{path}: no safetensors file has the tensor o_proj.weight, which the model needs"
    assert gloo_world(2).run(load, path, PP2) == [message, message]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(value, gloo_world, changed):
    norm = torch.ones(32)
    norm[5] = value
    path = changed(tiny_checkpoint("qwen3"), {"model.norm.weight": norm})
    message = f"{path}: NaN or infinite values in the weights: the model's decoder.final_layernorm.weight in rank 1"
    assert gloo_world(2).run(load, path, PP2) == [message, message]


@pytest.mark.parametrize("difference", [0.0, 1e-3])
def test_a_tied_head_may_be_stored_as_a_copy(difference, gloo_world, changed):
    source = tiny_checkpoint("qwen3_tied")
    head = load_file(source / "model.safetensors")[EMBEDDING].clone()
    head[98, 31] += difference
    path = changed(source, {HEAD: head})
    message = (
        f"{path}: model.safetensors: {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings = true; "
        "set it to false, or remove the tensor"
    )
    assert gloo_world(2).run(load, path, PP2) == [message if difference else None] * 2


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence_parallel": True}, {"expert": 2}, {"context": 2}])
def test_every_layout_reads_everything(layout, gloo_world):
    assert gloo_world(2).run(load, tiny_checkpoint("qwen3_moe"), layout) == [None, None]
