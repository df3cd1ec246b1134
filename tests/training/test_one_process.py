"""The one process that all layouts are compared with, compared with plain transformers and autograd."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from rows import RandomRows
from training_layouts import RECIPE, train_steps
from transformers import AutoModelForCausalLM

from megatron_gkd.data.order import SampleOrder
from megatron_gkd.ops import reference

STUDENT = functools.partial(tiny_checkpoint, "qwen3_tied", seed=2)


def teacher_of(vocab_size: int = 99):
    return tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48, vocab_size=vocab_size)


def oracle(
    student_path,
    teacher_path,
    beta,
    temperature,
    sft_alpha,
    divergence="jsd",
    of=lambda sample: True,
    rows=None,
    prepare=lambda model: model,
):
    """Loss, gradients and tokens of the first step, from unsharded models in fp64 and torch's autograd.

    `of` leaves rows out; `prepare` changes a model. The teacher reads a row's `teacher_prompt` where there is one, and
    a row may have weights of labels.
    """

    def open_model(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        return prepare(model).train()

    student = open_model(student_path)
    teacher = None if teacher_path is None else open_model(teacher_path)
    rows = rows or RandomRows(count=24)
    order = SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True).rows_of_step(
        1, RECIPE["train"]["global_batch_size"]
    )
    total, tokens = 0.0, 0
    for sample in filter(of, (rows[row] for row in order)):
        inputs, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)
        counts = labels != -100
        logits = student(inputs).logits[0][counts]
        weights = torch.ones(len(labels)) if sample.label_weights is None else torch.from_numpy(sample.label_weights)
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels[counts], reduction="none")
        if teacher is None:
            total = total + (weights[counts] * cross_entropy).sum()
        else:
            with torch.no_grad():
                start = int(counts.nonzero()[0]) + 1 if sample.response_start is None else sample.response_start
                prompt = sample.input_ids[:start] if sample.teacher_prompt is None else sample.teacher_prompt
                read = torch.from_numpy(np.concatenate([prompt, sample.input_ids[start:]]))[None]
                teacher_logits = teacher(read).logits[0, len(prompt) - 1 :][counts[start - 1 :]]
            shared = min(logits.shape[-1], teacher_logits.shape[-1])
            distances = reference.divergence(
                logits[:, :shared],
                teacher_logits[:, :shared],
                divergence=divergence,
                beta=beta,
                temperature=temperature,
            )
            total = total + (weights[counts] * (distances + sft_alpha * cross_entropy)).sum()
        tokens += int(counts.sum())
    loss = total / tokens
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}, tokens


def assert_equals_oracle(record, loss, gradients, tokens):
    assert record["totals"]["tokens"] == tokens
    assert record["totals"]["loss"] / record["totals"]["tokens"] == pytest.approx(loss, rel=1e-5)
    assert record["gradient"].keys() == gradients.keys()
    for name, expected in gradients.items():
        error = (record["gradient"][name].double() - expected).norm() / expected.norm()
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("sft_alpha", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equals_transformers(beta, sft_alpha, gloo_world):
    changes = {"distill": {"beta": beta, "sft_alpha": sft_alpha}}
    record = gloo_world(1).run(train_steps, STUDENT(), teacher_of(), changes)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), teacher_of(), beta, RECIPE["distill"]["temperature"], sft_alpha))


@pytest.mark.parametrize("divergence", reference.FAMILIES)
def test_every_divergence_equals_transformers(divergence, gloo_world):
    changes = {"distill": {"beta": 0.4, "divergence": divergence}}
    record = gloo_world(1).run(train_steps, STUDENT(), teacher_of(), changes)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), teacher_of(), 0.4, 0.9, 0.3, divergence))


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_top_k_of_the_whole_vocabulary_is_the_whole_divergence(tail, gloo_world):
    changes = {"distill": {"beta": 0.5, "gkd_logits_topk": 99, "gkd_topk_tail": tail}}
    record = gloo_world(1).run(train_steps, STUDENT(), teacher_of(), changes)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), teacher_of(), 0.5, 0.9, 0.3))


def test_without_a_teacher_it_is_cross_entropy(gloo_world):
    changes = {"teacher": {"teacher_kind": "none"}, "parallel": {"tensor_model_parallel_size": 2}}
    record = gloo_world(2).run(train_steps, STUDENT(), None, changes)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), None, None, None, None))


@pytest.mark.parametrize("vocab_size", [97, 112])
@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}])
def test_unequal_vocabularies_are_compared_over_the_shared_ids(vocab_size, parallel, gloo_world):
    """97 ids end within a shard of the student's 99; 112 are cut elsewhere than they."""
    teacher = teacher_of(vocab_size)
    changes = {"parallel": parallel, "distill": {"sft_alpha": 0.0}, "teacher": {"offload_teacher_model": True}}
    record = gloo_world(4 if parallel else 1).run(train_steps, STUDENT(), teacher, changes)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), teacher, 0.5, RECIPE["distill"]["temperature"], 0.0))
