"""The engine with the real vLLM in the ranks: the contract, new weights, and a training that doesn't notice."""

from __future__ import annotations

import functools
import importlib.util
import os
import random

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from rollout.contract import (
    CHECKPOINT,
    EOS,
    GREEDY,
    REQUESTS,
    Request,
    RolloutEngineContract,
    run_requests,
    tokens_of,
    transformers_greedy,
)
from rollout.new_weights import OTHER, assert_follows, error_of, generate, samples, weights_of

from megatron_gkd.rollout.base import RolloutFailed

NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)]


@functools.cache
def vllm_process(checkpoint, tensor_parallel_size):
    """This rank's one vLLM; and how the process had changed when it was there."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions
    from megatron_gkd.rollout.vllm.process import VllmProcess

    options = ColocatedOptions(
        torch.float32,
        256,
        tensor_parallel_size=tensor_parallel_size,
        kv_cache_memory_bytes=32 << 20,
        further={"max_num_seqs": 16, "enable_prefix_caching": True, "max_num_batched_tokens": 1024},
    )
    before = process_state()
    vllm = VllmProcess(Checkpoint.open(str(checkpoint)), options)
    return vllm, options, differences(before, process_state())


def start_with_heads_of(rank, world_size, checkpoint):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine
    from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(), seed=1)
    options = ColocatedOptions(torch.float32, 256, kv_cache_memory_bytes=32 << 20)
    try:
        VllmColocatedEngine.start(mesh, Checkpoint.open(str(checkpoint)), options)
    except RolloutFailed as error:
        return str(error)
    finally:
        destroy_mesh()


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have kernels for more sizes of heads")
def test_heads_that_vllm_has_no_kernel_for_are_refused_before_the_first_sample(gloo_world):
    (message,) = gloo_world(1).run(start_with_heads_of, tiny_checkpoint("qwen3", head_dim=24))
    assert "head_dim = 24: vLLM can't serve this on CPUs; allowed are 32, 64" in message and "\n" not in message


def open_engine(mesh, checkpoint, tensor_parallel_size=1):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.colocated import VllmColocatedEngine

    vllm, options, _ = vllm_process(checkpoint, tensor_parallel_size)
    return VllmColocatedEngine(mesh, Checkpoint.open(str(checkpoint)), options, vllm)


@functools.cache
def engine_of_one_rank(checkpoint):
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    engine = open_engine(initialize_mesh(Layout(), seed=1), checkpoint)
    destroy_mesh()  # the engine has no group of it
    return engine


def process_state():
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "cores": os.sched_getaffinity(0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "functions": (torch.set_num_threads, torch.Event, torch.cuda.Stream),
        "world": torch.distributed.group.WORLD,
        **{name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
    }


def differences(before, after):
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def results_of(rank, world_size, checkpoint):
    return run_requests(engine_of_one_rank(checkpoint), weights_of(checkpoint))


class TestVllmColocatedEngine(RolloutEngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, gloo_world):
        return gloo_world(1).run(results_of, CHECKPOINT())[0]


def load_one_after_another(rank, world_size, checkpoints, reset):
    from vllm import LLM

    engine, found = engine_of_one_rank(checkpoints[0]), []
    with pytest.MonkeyPatch.context() as patch:
        if not reset:
            patch.setattr(LLM, "reset_prefix_cache", lambda self: True)
        for version, checkpoint in enumerate(checkpoints):
            engine.load_weights(weights_of(checkpoint), version)
            found.append(samples(engine))
    return found


def test_new_weights_and_the_old_ones_again(gloo_world):
    a, b = CHECKPOINT(), OTHER()
    assert_follows(gloo_world(1).run(load_one_after_another, [a, b, a], True)[0])


def test_without_a_reset_the_prefix_cache_would_be_stale(gloo_world):
    """That is, the test above would notice."""
    _, second = gloo_world(1).run(load_one_after_another, [CHECKPOINT(), OTHER()], False)[0]
    assert error_of(second[1][0], OTHER()) > 1e-3


BAD = {
    "model.norm.weight is missing and should be (32,)": lambda tensors: tensors.pop("model.norm.weight"),
    "lm_head.weight is (98, 32) and should be (99, 32)": lambda tensors: tensors.update(
        {"lm_head.weight": tensors["lm_head.weight"][:-1]}
    ),
    "lm_tail.weight is (1,) and should be absent": lambda tensors: tensors.update({"lm_tail.weight": torch.ones(1)}),
}


def load_bad_tensors(rank, world_size, checkpoint, other):
    """For each of BAD: both messages, how many tensors were left, and what good ones give afterwards."""
    engine, found = engine_of_one_rank(checkpoint), []
    for spoil in BAD.values():
        tensors = dict(weights_of(other))
        spoil(tensors)
        named_tensors = iter(tensors.items())
        with pytest.raises(RolloutFailed) as refused:
            engine.load_weights(named_tensors, version=1)
        with pytest.raises(RolloutFailed) as none_there:
            generate(engine, REQUESTS["greedy"])
        engine.load_weights(weights_of(checkpoint), version=2)
        again = generate(engine, REQUESTS["greedy"])
        found.append((str(refused.value), str(none_there.value), len(list(named_tensors)), again))
    return found


def test_bad_tensors_are_refused_and_good_ones_serve_again(gloo_world):
    expected = transformers_greedy(CHECKPOINT(), REQUESTS["greedy"].prompts, 16)
    (found,) = gloo_world(1).run(load_bad_tensors, CHECKPOINT(), OTHER())
    for message, (refused, none_there, left, again) in zip(BAD, found, strict=True):
        assert refused.endswith(message)
        assert "no weights" in none_there
        assert left == 0, "other ranks would wait"
        assert tokens_of(again) == expected


def refuse(rank, world_size, checkpoint):
    engine = engine_of_one_rank(checkpoint)
    engine.load_weights(weights_of(checkpoint), version=1)
    with pytest.raises(RolloutFailed) as error:
        engine.generate([[5] * 3, [5] * 256], GREEDY, [0, 1])
    nearly = engine.generate([[5] * 250], GREEDY, [0])
    return str(error.value), len(nearly[0].token_ids), nearly[0].finish_reason


def test_completions_end_at_the_longest_sequence(gloo_world):
    message, length, reason = gloo_world(1).run(refuse, CHECKPOINT())[0]
    assert message == "prompt 1 of 256 tokens leaves no room for a completion in rollout.vllm_max_model_len = 256"
    assert (length, reason) == (6, "length")


def sleep_between(rank, world_size, checkpoint):
    """The tokens of two steps. On a CPU sleep frees nothing, but vLLM keeps account of it, and does not schedule."""
    engine = engine_of_one_rank(checkpoint)
    found, executor = [], engine.vllm.llm.llm_engine.model_executor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.vllm, "can_sleep", True)
        for version in range(2):
            engine.load_weights(weights_of(checkpoint), version)
            with engine.resident():
                found.append((executor.is_sleeping, tokens_of(generate(engine, REQUESTS["greedy"]))))
            assert executor.is_sleeping
        engine._wake_up(engine.asleep)
    return found


def test_vllm_wakes_up_to_generate(gloo_world):
    expected = transformers_greedy(CHECKPOINT(), REQUESTS["greedy"].prompts, 16)
    assert gloo_world(1).run(sleep_between, CHECKPOINT())[0] == 2 * [(False, expected)]


def train(rank, world_size, checkpoint, engine_name, leaves=False):
    """Two training steps. With an engine: its samples before each and at the end, and how it changed the process.

    The student is in host memory while the engine samples if it `leaves`.
    """
    from training_layouts import build, named_gradients

    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload

    _, student, _, batches = build(checkpoint, None, {"teacher": {"teacher_kind": "none"}})
    engine, records, completions, changes = None, [], [], []
    offload = StudentOffload(student, OffloadOptions(leaves, leaves))
    if engine_name == "vllm":
        engine = open_engine(student.mesh, checkpoint)
        changes += vllm_process(checkpoint, 1)[2]
    elif engine_name == "megatron":
        engine = MegatronEngine(student.model, [EOS])

    def sample(version):
        if engine is not None:
            before = process_state()
            engine.load_weights(student.model.named_tensors(), version)
            with offload.away(), engine.resident():
                assert (offload.freed_bytes > 0) == leaves
                completions.append(generate(engine, REQUESTS["greedy"]))
            changes.extend(differences(before, process_state()))

    for step, microbatches in zip(range(2), batches, strict=False):
        sample(step)
        totals = student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        records.append((totals, named_gradients(student), student.update()))
    sample(2)
    destroy_mesh()
    return records, completions, changes


@pytest.mark.parametrize("leaves", [False, True])
def test_training_goes_on_as_if_nothing_had_been_sampled(leaves, gloo_world):
    undisturbed, _, _ = gloo_world(1).run(train, CHECKPOINT(), None)[0]
    records, by_vllm, changes = gloo_world(1).run(train, CHECKPOINT(), "vllm", leaves)[0]
    _, by_the_student, _ = gloo_world(1).run(train, CHECKPOINT(), "megatron")[0]
    for (totals, gradients, norm), (expected_totals, expected_gradients, expected_norm) in zip(
        records, undisturbed, strict=True
    ):
        assert totals == expected_totals and norm == expected_norm > 0
        for name, gradient in expected_gradients.items():
            assert torch.equal(gradients[name], gradient), name
    assert not changes
    assert tokens_of(by_vllm[0]) != tokens_of(by_vllm[2])
    for version, (found, expected) in enumerate(zip(by_vllm, by_the_student, strict=True)):
        assert tokens_of(found) == tokens_of(expected)
        assert {completion.version for completion in found} == {version}


def share_an_engine(rank, world_size, checkpoint, other, layout, requests):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    engine = open_engine(mesh, checkpoint, tensor_parallel_size=2)
    model = MegatronModel.load(Checkpoint.open(str(other)), mesh, BuildOptions())
    engine.load_weights(model.named_tensors(), version=3)
    completions = generate(engine, requests[mesh.dp.rank()])
    destroy_mesh()
    return completions


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["TP2", "PP2", "DP2"])
def test_two_ranks_share_an_engine(layout, gloo_world):
    requests = [REQUESTS["greedy"], None if layout else Request.of([3], GREEDY)]
    ranks = gloo_world(2).run(share_an_engine, CHECKPOINT(), OTHER(), layout, requests)
    for rank, completions in enumerate(ranks):
        request = requests[0 if layout else rank]
        assert tokens_of(completions) == transformers_greedy(OTHER(), request.prompts, 16)
        assert {completion.version for completion in completions} == {3}
