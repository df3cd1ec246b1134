"""Selective recomputing by module: the same gradients, and fewer bytes that wait for the backward pass."""

from __future__ import annotations

import contextlib

import pytest
import torch
from families.text import tiny_family
from training_layouts import build, named_gradients

NO_TEACHER = {"teacher": {"teacher_kind": "none", "teacher_model": None}}
MODULES = {  # family: modules, each with the modules that are recomputed beside it
    "qwen3": [("core_attn",), ("mlp",)],
    "deepseek_v3": [("mla_up_proj",), ("layernorm",), ("moe_act",), ("moe",), ("shared_experts",), ("mlp",)],
}
CASES_OF_MODULES = [(family, modules) for family, all_modules in MODULES.items() for modules in all_modules]


class SavedBytes:
    """Counts the storages that autograd keeps, but for those of parameters.

    Attributes:
        most: bytes of all distinct ones when the backward pass begins.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._storages[storage._cdata] = storage
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.most = self.most or sum(storage.nbytes() for storage in self._storages.values())
        return tensor


def measure(rank, world_size, path, changes):
    """Return the gradients of a step of one microbatch, and the bytes that autograd kept for it."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, batches = build(path, None, changes | NO_TEACHER)
    microbatches = next(iter(batches))[:1]
    saved = SavedBytes([*student.model.chunks[0].parameters(), *student.model.chunks[0].buffers()])
    student.compute_gradients(microbatches, [None])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack))
        student.compute_gradients(microbatches, [None])
    found = named_gradients(student), saved.most
    destroy_mesh()
    return found


@pytest.fixture(scope="module")
def plain(gloo_world):
    found = {}

    def of(family: str):
        if family not in found:
            path = tiny_family(family)
            found[family] = path, *gloo_world(1).run(measure, path, {})[0]
        return found[family]

    return of


@pytest.mark.parametrize(("family", "modules"), CASES_OF_MODULES)
def test_recomputed_modules(family, modules, plain, gloo_world):
    path, gradients, num_bytes = plain(family)
    parallel = {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    found, fewer = gloo_world(1).run(measure, path, {"parallel": parallel})[0]
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert fewer < num_bytes, f"{modules}: {fewer} bytes are kept, without recomputing {num_bytes}"
