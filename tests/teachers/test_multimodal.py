"""Multimodal teachers: what they read of the student's rows, and the distributions at the student's labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layouts import DENSE
from teachers.contract import mesh_of, read_signal
from teachers.vision_rows import image, image_sample, other_processor, processing_of, vision_log_probs, vision_teacher
from vision_checkpoints import tiny_vision_checkpoint

from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.vision.comparison import is_same_processing
from megatron_gkd.data.vision.processor import PixelLimits
from megatron_gkd.errors import UserError

VOCABULARY = 301
LAYOUTS = ["micro batch 2", "TP2+SPxCP2", "TP2xPP2"]
SMALL, TALL, WIDE = image(16, 24), image(32, 16, seed=1), image(40, 56, seed=2)


def microbatches(processing):
    """Rows of two images, one, and none, by the processor that tokenizes them; a microbatch of text alone."""
    rows = [
        image_sample(processing, 3, SMALL, 4, TALL, 2, seed=1),
        image_sample(processing, 5, seed=2),
        image_sample(processing, 2, WIDE, response=6, seed=3),  # the image's last token predicts the response
        image_sample(processing, 7, response=3, seed=4),
    ]
    return [rows[:2], rows[2:3], rows[3:]]


def score(mesh, teacher, samples, processing):
    """What this rank has of each microbatch: numbers of labels, and logits; None before the last stage."""
    from megatron_gkd.data.microbatch import add_pixels, collate, shard_context_parallel

    found = []
    for rows in samples:
        whole = collate(rows, pad_multiple=mesh.layout.pad_multiple, images=processing)
        if processing is not None and mesh.pp.rank() == 0:
            whole = add_pixels(whole, processing)
        found.append(shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size()))
    with teacher.resident():
        signals = teacher.score(found)
    read = [read_signal(signal, one, mesh, VOCABULARY) for signal, one in zip(signals, found, strict=True)]
    return [entries and [(one.numbers, one.values) for one in entries] for entries in read]


def local_results(rank, world_size, layout, student, samples, tokens=None):
    """Of a local teacher; `student`: the folder of its processor, None for a text model."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.label_states import ScoringOptions
    from megatron_gkd.teachers.local import LocalTeacher
    from megatron_gkd.teachers.model_inputs import ModelInputs

    students = None if student is None else processing_of(student)
    with mesh_of(layout) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(vision_teacher())), mesh, BuildOptions())
        inputs = ModelInputs(students, processing_of(vision_teacher()))
        options = ScoringOptions(micro_batch_tokens=tokens)
        teacher = LocalTeacher(model, head_rows=-(-VOCABULARY // mesh.tp.size()), inputs=inputs, options=options)
        return score(mesh, teacher, samples, students)


def self_results(rank, world_size, layout, samples):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.self_teacher import SelfTeacher
    from megatron_gkd.teachers.self_weights import InitialWeights

    processing = processing_of(vision_teacher())
    with mesh_of(layout) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(vision_teacher())), mesh, BuildOptions())
        weights = InitialWeights(model)
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        return score(mesh, SelfTeacher(model, weights, lambda: None, processing), samples, processing)


def assert_distributions(ranks, expected) -> None:
    """Every label of every microbatch is on one context-parallel rank, with the distributions `expected`."""
    labels = [0] * len(expected)
    for rank in ranks:
        for index, (parts, reference) in enumerate(zip(rank, expected, strict=True)):
            for numbers, values in parts or []:
                found = values.double().log_softmax(-1)
                torch.testing.assert_close(found, reference[numbers], atol=1e-4, rtol=0)
                labels[index] += len(numbers)
    replicas = [count / len(reference) for count, reference in zip(labels, expected, strict=True)]
    assert len(set(replicas)) == 1 and replicas[0] >= 1


def expected_of(samples):
    return [torch.cat([vision_log_probs(vision_teacher(), row) for row in rows]) for rows in samples]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_teacher_with_the_students_processing_reads_its_microbatches(name, gloo_world):
    world_size, layout = DENSE[name]
    samples = microbatches(processing_of(vision_teacher()))
    ranks = gloo_world(world_size).run(local_results, layout, vision_teacher(), samples)
    assert_distributions(ranks, expected_of(samples))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_teacher_with_another_processor_reads_its_own_tokens_and_pixels(name, gloo_world):
    world_size, layout = DENSE[name]
    other = other_processor(vision_teacher())
    samples, own = (microbatches(processing_of(folder)) for folder in (other, vision_teacher()))
    assert {len(row.input_ids) for rows in samples for row in rows if row.images}.isdisjoint(
        len(row.input_ids) for rows in own for row in rows if row.images
    )
    ranks = gloo_world(world_size).run(local_results, layout, other, samples)
    assert_distributions(ranks, expected_of(own))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("is_same", [True, False])
def test_joined_microbatches_keep_their_images(name, is_same, gloo_world):
    world_size, layout = DENSE[name]
    student = vision_teacher() if is_same else other_processor(vision_teacher())
    samples, own = (microbatches(processing_of(folder)) for folder in (student, vision_teacher()))
    ranks = gloo_world(world_size).run(local_results, layout, student, samples, 10_000)
    assert_distributions(ranks, expected_of(own))


def test_a_multimodal_teacher_scores_the_rows_of_a_text_student(gloo_world):
    samples = microbatches(processing_of(vision_teacher()))[2:]
    assert_distributions(gloo_world(1).run(local_results, {}, None, samples), expected_of(samples))


@pytest.mark.parametrize("name", ["micro batch 2", "TP2xPP2"])
def test_a_student_reads_other_images_as_its_own_teacher(name, gloo_world):
    """A prompt with more images than the row's, one with the row's own, and rows without a prompt of its own."""
    processing = processing_of(vision_teacher())
    samples = microbatches(processing)
    first, text = samples[0]
    more = image_sample(processing, 4, SMALL, 1, WIDE, 3, response=1, seed=11)
    same = image_sample(processing, 1, SMALL, 2, TALL, 5, response=1, seed=12)
    samples[0] = [
        replace(first, teacher_prompt=same.input_ids[:-1]),
        replace(text, teacher_prompt=more.input_ids[:-1], teacher_images=more.images),
    ]
    views = [[teacher_view(row) for row in rows] for rows in samples]
    assert [[row.images for row in rows] for rows in views] == [[(SMALL, TALL), (SMALL, WIDE)], [(WIDE,)], [()]]
    world_size, layout = DENSE[name]
    assert_distributions(gloo_world(world_size).run(self_results, layout, samples), expected_of(views))


def results_by_tag(rank, world_size, samples):
    """Of two teachers, which get microbatches of their rows without pixels and positions."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.local import LocalTeacher
    from megatron_gkd.teachers.model_inputs import ModelInputs
    from megatron_gkd.teachers.several import SeveralTeachers

    processing = processing_of(vision_teacher())
    with mesh_of({"parallel": {"pipeline_model_parallel_size": world_size}}) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(vision_teacher())), mesh, BuildOptions())
        one = LocalTeacher(model, head_rows=VOCABULARY, inputs=ModelInputs(processing, processing))
        return score(mesh, SeveralTeachers({("a",): one, ("b",): one}, mesh), samples, processing)


def test_several_teachers_read_the_images_of_their_rows(gloo_world):
    samples = microbatches(processing_of(vision_teacher()))
    tagged = [[replace(row, tag="ab"[row.row_id % 2]) for row in rows] for rows in samples]
    assert_distributions(gloo_world(2).run(results_by_tag, tagged), expected_of(samples))


def test_an_unreadable_image_is_an_error_on_all_ranks(gloo_world, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(open(SMALL.location, "rb").read())
    gone = replace(SMALL, location=str(path))
    processing = processing_of(vision_teacher())
    prompt = image_sample(processing, 2, gone, 2, response=1, seed=1)
    row = replace(image_sample(processing, 5, seed=2), teacher_prompt=prompt.input_ids[:-1], teacher_images=(gone,))
    path.unlink()
    with pytest.raises(UserError, match=r"image\.png: No such file"):
        gloo_world(2).run(self_results, {"parallel": {"pipeline_model_parallel_size": 2}}, [[row]])


class TestComparison:
    def test_processors_of_one_family_agree_unless_their_settings_differ(self):
        own = processing_of(vision_teacher())
        assert is_same_processing(own, processing_of(tiny_vision_checkpoint("qwen2_5_vl", 3)))
        assert not is_same_processing(own, processing_of(other_processor(vision_teacher())))
        assert not is_same_processing(own, processing_of(vision_teacher(), PixelLimits(max_pixels=1024)))

    def test_positions_of_another_kind_differ(self):
        own, intern = processing_of(vision_teacher()), processing_of(tiny_vision_checkpoint("internvl"))
        assert not is_same_processing(own, intern)
