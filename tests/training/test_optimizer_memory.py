"""Optimizer state in host memory or in fewer bits: the same training, less device memory, and runs that go on."""

from __future__ import annotations

import functools

import pytest
import torch
from layouts import EP2, PP2, SP, TP2
from rows import RandomRows
from training.checkpointing.test_resume import build_run, model_of, resume, train_and_save
from training_layouts import build, named_gradients, weights_of

HOST = {"optimizer_cpu_offload": True}
HALF = HOST | {"optimizer_offload_fraction": 0.5}
PRECISE = {"use_precision_aware_optimizer": True}
SMALL = PRECISE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "main_grads_dtype": "bf16"}
SCALED = PRECISE | {"main_params_dtype": "fp16", "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}
BF16, FP32 = ({"train": {"dtype": dtype, "weight_decay": 0.1}} for dtype in ("bf16", "fp32"))
LORA = {"lora": {"lora_rank": 4, "lora_alpha": 8}, "train": {"dtype": "bf16", "weight_decay": 0.1, "lr": 1e-2}}


def with_memory(changes, memory):
    return changes | {"memory": memory}


def train(rank, world_size, model, changes):
    """Return losses and norms of three steps, the weights, device bytes by kind, the norm of the last gradient."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.optimizer_state import adam_name, state_tensors

    plain = {"teacher": {"teacher_kind": "none", "teacher_model": None}}
    _, student, _, batches = build(model, None, plain | changes, RandomRows(count=24))
    records = []
    for microbatches in batches:
        totals = student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        norm = sum(one.double().square().sum() for one in named_gradients(student).values()).sqrt().item()
        records.append((totals["loss"], student.update(), norm))
    weights = [p.data for chunk in student.model.chunks for p in chunk.parameters()]
    gradients = [p.main_grad for chunk in student.model.chunks for p in chunk.parameters() if hasattr(p, "main_grad")]
    of_model = {one.untyped_storage()._cdata for one in weights}
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in state_tensors(student.optimizer)
    }
    state = sum(size for storage, size in storages.items() if storage not in of_model)
    sizes = {"gradients": sum(one.nbytes for one in gradients), "state": state}
    found = records, weights_of(student), sizes, adam_name(student.optimizer)
    destroy_mesh()
    return found


@pytest.fixture(scope="module")
def trained(gloo_world):
    @functools.cache
    def of(layout, dtype, memory):
        size, changes = LAYOUTS[layout]
        changes = with_memory({"bf16": BF16, "fp32": FP32}[dtype] | changes, dict(memory))
        return gloo_world(size).run(train, model_of(changes), changes)[0]

    return of


LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "PP2": (2, {"parallel": PP2}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "DP2, overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
}


def key(memory):
    return tuple(sorted(memory.items()))


def error_of(found, expected) -> float:
    return max(
        ((found[name].float() - one.float()).norm() / one.float().norm()).item() for name, one in expected.items()
    )


HOSTED = [
    ("one process", "fp32", HALF),
    ("DP2", "bf16", HOST),
    ("DP2", "fp32", HALF),
    ("PP2", "bf16", HALF),
    ("TP2+SPxEP2", "bf16", HALF),
    ("TP2+SPxEP2", "fp32", HOST),
    ("DP2, overlapped", "bf16", HALF),
]


@pytest.mark.parametrize(("layout", "dtype", "memory"), HOSTED)
def test_state_in_host_memory_trains_the_same(layout, dtype, memory, trained):
    """Up to the rounding of torch's fused Adam, which runs on the host."""
    found, expected = trained(layout, dtype, key(memory)), trained(layout, dtype, ())
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6 if dtype == "fp32" else 1e-4)
    assert error_of(found[1], expected[1]) < (1e-6 if dtype == "fp32" else 2e-3)
    # Three fp32 numbers for each parameter of which this rank has the state; fp32 weights are their own copy.
    plain, share = expected[2]["state"], 1 if memory == HOST else 0.5
    assert found[2]["state"] <= (1 - share) * plain + 0.02 * plain
    assert found[2]["gradients"] == expected[2]["gradients"]
    assert ("host memory" in found[3], expected[3]) == (True, "torch's AdamW")


@pytest.mark.parametrize("layout", ["PP2", "TP2+SPxEP2"])
def test_precise_types_train_the_same_with_less(layout, trained):
    """Master weights of 16 bits beside bf16 parameters are exact; only ties are rounded in the other direction."""
    found, expected = trained(layout, "bf16", key(PRECISE)), trained(layout, "bf16", ())
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert error_of(found[1], expected[1]) < 3e-3
    assert found[2]["state"] == pytest.approx(expected[2]["state"] * 10 / 12, rel=1e-3)


@pytest.mark.parametrize(
    ("memory", "bytes_of_state", "bytes_of_gradient"), [(SMALL, 6, 2), (SCALED, 5, 4)], ids=["bf16", "scaled"]
)
def test_fewer_bits_train_nearly_the_same_with_less(memory, bytes_of_state, bytes_of_gradient, trained):
    found, expected = trained("DP2", "bf16", key(memory)), trained("DP2", "bf16", ())
    for step, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
        assert a[0] == pytest.approx(b[0], rel=1e-6 if step == 0 else 2e-3)
        assert a[1] == pytest.approx(b[1], rel=2e-2)
        if bytes_of_gradient == 2:
            assert a[1] == pytest.approx(a[2], rel=1e-6), "the norm of bf16 gradients is computed in fp32"
    assert 0 < error_of(found[1], expected[1]) < 1e-2
    assert found[2]["state"] == pytest.approx(expected[2]["state"] * bytes_of_state / 12, rel=1e-3)
    assert found[2]["gradients"] == expected[2]["gradients"] * bytes_of_gradient / 4


def test_large_gradients_are_clipped(trained, gloo_world):
    """The clipping must find the gradients where the precision-aware optimizer reads them."""
    changes = with_memory({"train": BF16["train"] | {"clip_grad": 0.01}}, PRECISE)
    clipped = gloo_world(1).run(train, model_of({}), changes)[0]
    plain = gloo_world(1).run(train, model_of({}), with_memory(changes, {}))[0]
    assert error_of(clipped[1], plain[1]) < 3e-3
    assert error_of(plain[1], trained("one process", "bf16", ())[1]) > 1e-2


RESUMED = {
    "DP2, host": (2, with_memory(BF16, HOST)),
    "PP2, half on the host": (2, with_memory(BF16 | {"parallel": PP2}, HALF)),
    "fp32, half on the host": (1, with_memory(FP32, HALF)),
    "adapters in fp32, half on the host": (1, with_memory(LORA, HALF)),
    "DP2, precise": (2, with_memory(BF16, PRECISE)),
    "TP2+SPxEP2, precise, bf16": (2, with_memory(BF16 | {"parallel": TP2 | SP | EP2}, SMALL)),
    "DP2, precise, scaled": (2, with_memory(BF16, SCALED)),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_resumes(case, gloo_world, tmp_path):
    """Bit by bit; a scaling factor that is computed again may differ by its rounding."""
    size, changes = RESUMED[case]
    arguments = model_of(changes), changes, tmp_path
    expected_of_ranks = gloo_world(size).run(train_and_save, *arguments)
    for found, expected in zip(gloo_world(size).run(resume, *arguments), expected_of_ranks, strict=True):
        if "scaled" in case:
            assert error_of(found[1], expected[1]) < 1e-3
            continue
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
        assert len(expected[2]) > 10 or not expected[2]
        assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


def states_of(student) -> list[dict[str, torch.Tensor]]:
    """The fp32 master weights and moments of this rank, in the model's order."""
    from megatron_gkd.training.checkpointing.workarounds import fill_empty_states
    from megatron_gkd.training.optimizer_state import optimizer_parts

    fill_empty_states(student.optimizer)
    found = []
    for part in optimizer_parts(student.optimizer):
        for parameter in part.model_param_gbuf_map if not part.is_stub_optimizer else ():
            if parameter in part.model_param_group_index_map:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                found.append(
                    {name: tensors[name].detach().float().clone() for name in ("param", "exp_avg", "exp_avg_sq")}
                )
    return found


def load_as(rank, world_size, model, changes, directory):
    """Load a checkpoint of step 1; return states, then the weights after one more step."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load

    student, _, saved, batches = build_run(model, changes)
    load(saved, CheckpointFolder(directory).final(1), step=1)
    states = states_of(student)
    microbatches = list(batches)[1]
    student.compute_gradients(microbatches, [None] * len(microbatches))
    student.update()
    found = states, weights_of(student)
    destroy_mesh()
    return found


@pytest.mark.parametrize("writer", [{}, HALF, PRECISE], ids=["plain", "half on the host", "precise"])
def test_other_optimizers_continue_from_the_same_state(writer, gloo_world, tmp_path):
    """The master weights are the same fp32 numbers whichever optimizer has written and reads them."""
    model = model_of({})
    gloo_world(2).run(train_and_save, model, with_memory(BF16, writer), tmp_path)
    runs = [gloo_world(2).run(load_as, model, with_memory(BF16, one), tmp_path)[0] for one in ({}, HALF, PRECISE)]
    for states, weights in runs[1:]:
        assert len(states) == len(runs[0][0]) > 10
        for found, expected in zip(states, runs[0][0], strict=True):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert error_of(weights, runs[0][1]) < 3e-3


def load_weights_and_train(rank, world_size, model, changes, directory):
    """Start from a checkpoint's weights alone; return them and those after one step."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load_weights

    student, _, saved, batches = build_run(model, changes)
    load_weights(saved, CheckpointFolder(directory).final(1))
    before, microbatches = weights_of(student), next(iter(batches))
    student.compute_gradients(microbatches, [None] * len(microbatches))
    student.update()
    found = before, weights_of(student)
    destroy_mesh()
    return found


@pytest.mark.parametrize("changes", [BF16, FP32], ids=["bf16", "fp32"])
def test_new_runs_start_from_loaded_weights(changes, gloo_world, tmp_path):
    """The host's copies follow: a first update of stale ones would undo what was loaded."""
    model = model_of({})
    gloo_world(1).run(train_and_save, model, changes, tmp_path)
    found, expected = (
        gloo_world(1).run(load_weights_and_train, model, with_memory(changes, one), tmp_path)[0] for one in (HALF, {})
    )
    assert all(torch.equal(found[0][name], one) for name, one in expected[0].items())
    assert error_of(found[1], expected[1]) < 1e-6


def test_the_devices_part_counts_on_after_a_resume():
    """Transformer Engine's Adam counts in its groups, which get the rates of each step."""
    from megatron_gkd.training.hybrid_optimizer import HostOptimizer

    weights = [torch.ones(4), torch.ones(4)]
    adam = torch.optim.AdamW
    optimizer = HostOptimizer(
        weights, offload_fraction=0.5, cpu_optimizer_cls=adam, gpu_optimizer_cls=adam, param_update_in_fp32=True, lr=0.1
    )
    optimizer.param_groups[0] |= {"step": 3, "lr": 0.2}
    optimizer.gpu_optimizer.param_groups[0]["step"] = 5
    optimizer._sync_hdo_param_groups_to_sub_optimizers()
    group = optimizer.gpu_optimizer.param_groups[0]
    assert (group["step"], group["lr"]) == (5, 0.2)
