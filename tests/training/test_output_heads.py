"""Heads with a bias, a scale and a softcap, of student and teacher: losses, gradients and samples are transformers'."""

from __future__ import annotations

import pytest
import torch
from output_heads import STUDENT, TEACHER, bias_gradient, heads_are_read, with_head
from training.test_one_process import assert_equals_oracle, oracle
from training_layouts import assert_equal_runs, build, train_steps
from transformers import AutoModelForCausalLM

DISTILL = {"distill": {"beta": 0.5}}
LAYOUTS = {
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2xCP2": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
}


def train(rank, world_size, student, teacher, changes):
    """As `train_steps`, with the gradient of the head's bias."""
    import training_layouts

    def named_gradients(student):
        return without_bias(student) | {"lm_head.bias": bias_gradient(student)}

    without_bias = training_layouts.named_gradients
    with heads_are_read(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_layouts, "named_gradients", named_gradients)
        return train_steps(rank, world_size, student, teacher, changes)


@pytest.fixture(scope="module")
def one_process(gloo_world):
    return gloo_world(1).run(train, STUDENT(), TEACHER(), DISTILL)[0]


def expected(beta, divergence="jsd", teacher=TEACHER):
    path = None if teacher is None else teacher()
    return oracle(STUDENT(), path, beta, 0.9, 0.3, divergence, prepare=with_head)


def test_one_process_equals_transformers(one_process):
    assert_equals_oracle(one_process[0], *expected(0.5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout, gloo_world, one_process):
    world_size, parallel = LAYOUTS[layout]
    changes = DISTILL | {"parallel": parallel, "teacher": {"offload_teacher_model": True}}
    assert_equal_runs(gloo_world(world_size).run(train, STUDENT(), TEACHER(), changes)[0], one_process)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_kl_divergences_equal_transformers(beta, gloo_world):
    record = gloo_world(1).run(train, STUDENT(), TEACHER(), {"distill": {"beta": beta}})[0][0]
    assert_equals_oracle(record, *expected(beta))


def test_without_a_teacher_it_is_cross_entropy(gloo_world):
    changes = {"teacher": {"teacher_kind": "none"}, "parallel": {"tensor_model_parallel_size": 2}}
    record = gloo_world(2).run(train, STUDENT(), None, changes)[0][0]
    assert_equals_oracle(record, *expected(None, teacher=None))


PROMPTS = [[4, 5, 6], [7, 8, 9, 10, 11]]


def sample(rank, world_size, layout):
    """The embedded engine's greedy completions."""
    from rollout.megatron.test_engine import open_engine

    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.runtime.mesh import destroy_mesh

    with heads_are_read():
        engine = open_engine(STUDENT(), layout, {})
        found = engine.generate(PROMPTS, Sampling(max_completion_length=6, temperature=0.0, ignore_eos=True), [1, 2])
    destroy_mesh()
    return [(completion.token_ids, completion.log_probs) for completion in found]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}])
def test_samples_of_the_embedded_engine_are_from_the_same_distribution(layout, gloo_world):
    found = gloo_world(layout.get("tensor", 1)).run(sample, layout)[0]
    plain = AutoModelForCausalLM.from_pretrained(STUDENT(), dtype=torch.float64, attn_implementation="eager")
    model = with_head(plain).eval()
    for prompt, (token_ids, log_probs) in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == token_ids
        assert log_probs == pytest.approx(logits.log_softmax(-1).amax(-1).tolist(), abs=1e-5)


def cache_rows(rank, world_size, changes):
    """The samples of the first step on this rank, and what a cache would keep of the teacher's scores."""
    from megatron_gkd.checkpoint_format.cache_manifest import Manifest
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.cache.entries import build_cached_rows

    with heads_are_read():
        mesh, _student, teacher, batches = build(STUDENT(), TEACHER(), changes)
        microbatches = next(iter(batches))
        with teacher.resident():
            signals = teacher.score(microbatches)
    manifest = Manifest(k=4, temperature=0.9, tokenizer="t", teacher="t", vocab_size=99)
    pairs = zip(signals, microbatches, strict=True)
    rows = [build_cached_rows(signal, microbatch, manifest, mesh, chunk_tokens=5) for signal, microbatch in pairs]
    destroy_mesh()
    return [microbatch.samples for microbatch in microbatches], rows


def test_a_cache_keeps_the_log_probs_of_the_whole_head(gloo_world):
    found, *_ = gloo_world(2).run(cache_rows, {"parallel": {"tensor_model_parallel_size": 2}})
    plain = AutoModelForCausalLM.from_pretrained(TEACHER(), dtype=torch.float64, attn_implementation="eager")
    model = with_head(plain).eval()
    assert sum(map(len, found[0])) == 4
    for samples, rows in zip(*found, strict=True):
        for sample, row in zip(samples, rows, strict=True):
            with torch.no_grad():
                logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0, sample.label_positions, :99]
            best = logits.log_softmax(-1).topk(4)
            assert row.ids.tolist() == best.indices.tolist()
            torch.testing.assert_close(torch.from_numpy(row.log_probs).double(), best.values, rtol=1e-5, atol=1e-5)
