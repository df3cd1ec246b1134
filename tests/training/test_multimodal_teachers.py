"""A step of a multimodal student with multimodal teachers, compared with transformers and autograd."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from teachers.vision_rows import (
    image,
    image_sample,
    open_vision_model,
    processing_of,
    vision_logits,
    vision_student,
    vision_teacher,
)
from training_layouts import assert_equal_runs, recipe_of
from vision.vision_runs import TRAINED, merged, named_gradients
from vision_checkpoints import vision_tokenizer

from megatron_gkd.data.vision.processor import PixelLimits
from megatron_gkd.errors import UserError
from megatron_gkd.ops import reference

BETA, TEMPERATURE, K = 0.5, 0.9, 9
LAYOUTS = {
    "one process": (1, {}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}


def rows_of(folder: Path, *, privileged: bool = False) -> list:
    """Rows as a checkpoint's processor makes them; `privileged`: with more images for the teacher in some."""
    processing, more = processing_of(folder), image(32, 24, seed=9)
    rows = [
        image_sample(processing, 3, image(16, 24), 4, image(32, 16, seed=1), 2, seed=1),
        image_sample(processing, 5, seed=2),
        image_sample(processing, 2, image(40, 56, seed=2), response=6, seed=3),
        image_sample(processing, 7, response=3, seed=4),
    ]
    if privileged:
        prompts = [image_sample(processing, 4, more, 3, image(16, 24), 5, response=1, seed=20), None]
        prompts += [image_sample(processing, 6, response=1, seed=21), image_sample(processing, 1, more, 2, response=1)]
        rows = [
            row if prompt is None else replace(row, teacher_prompt=prompt.input_ids[:-1], teacher_images=prompt.images)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
    return rows


def step(rank, world_size, student, teacher, changes, rows):
    """Return the totals and the whole gradient of a step over `rows`, like `training_layouts.train_steps`."""
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.build import build_student
    from megatron_gkd.training.build_teacher import build_teacher

    distill = {"beta": BETA, "temperature": TEMPERATURE, "sft_alpha": 0.0}
    recipe = recipe_of(merged(TRAINED, {"distill": distill}, changes))
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoint = Checkpoint.open(str(student))
    teachers = {"teacher": Checkpoint.open(str(teacher))} if teacher else {}
    trained = build_student(recipe, mesh, checkpoint, checkpoint.vocab_size, train_iters=3)
    scorer = build_teacher(recipe, mesh, trained, teachers)
    config = BatchConfig.from_recipe(recipe, mesh, 0, processing_of(student))
    lengths = [len(row.input_ids) for row in rows]
    microbatches = MicrobatchPlanner(config).make_microbatches(lengths, rows.__getitem__)
    with scorer.resident():
        signals = scorer.score(microbatches)
    totals = trained.compute_gradients(microbatches, signals, force_all_reduce=True)
    gradient = named_gradients(trained)
    destroy_mesh()
    return {"totals": totals, "gradient": gradient if rank == 0 else None, "grad_norm": 0.0}


def oracle(student: Path, rows, teacher: Path, teachers_rows, folder: Path):
    """Loss and gradients by name on disk, from unsharded models in fp64. `teachers_rows`: as the teacher reads them."""
    model, scorer = (open_vision_model(path, torch.float64) for path in (student, teacher))
    total, tokens = 0.0, 0
    for row, read in zip(rows, teachers_rows, strict=True):
        logits = vision_logits(model, processing_of(student), row.input_ids, row.images)[row.label_positions]
        with torch.no_grad():
            found = vision_logits(scorer, processing_of(teacher), read.input_ids, read.images)[read.label_positions]
        distances = reference.divergence(logits, found, divergence="jsd", beta=BETA, temperature=TEMPERATURE)
        total, tokens = total + distances.sum(), tokens + row.num_labels
    (total / tokens).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(folder)
    return total.item() / tokens, load_file(folder / "model.safetensors"), tokens


def assert_equals(record, loss, gradients, tokens) -> None:
    assert record["totals"]["tokens"] == tokens
    assert record["totals"]["loss"] / tokens == pytest.approx(loss, rel=1e-5)
    assert record["gradient"].keys() == gradients.keys()
    for name, expected in gradients.items():
        error = (record["gradient"][name].double() - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@functools.cache
def expected_of(is_same: bool, folder: Path):
    student, teacher = vision_student(is_same), vision_teacher()
    return oracle(student, rows_of(student), teacher, rows_of(teacher), folder)


@pytest.fixture(scope="module")
def gradients_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gradients")


@pytest.mark.parametrize("layout", ["one process", "TP2+SP", "PP2", "CP2"])
def test_a_teacher_with_another_processor(layout, gloo_world, gradients_folder):
    world_size, parallel = LAYOUTS[layout]
    student = vision_student(False)
    pairs = zip(rows_of(student), rows_of(vision_teacher()), strict=True)
    assert any(len(row.input_ids) != len(read.input_ids) for row, read in pairs)
    found = gloo_world(world_size).run(step, student, vision_teacher(), {"parallel": parallel}, rows_of(student))[0]
    assert_equals(found, *expected_of(False, gradients_folder / "other"))


def test_a_teacher_with_the_students_processor(gloo_world, gradients_folder):
    student = vision_student(True)
    found = gloo_world(1).run(step, student, vision_teacher(), {}, rows_of(student))[0]
    assert_equals(found, *expected_of(True, gradients_folder / "same"))


@pytest.mark.parametrize("layout", ["one process", "CP2", "PP2xVPP2"])
def test_the_student_reads_more_images_as_its_own_teacher(layout, gloo_world, tmp_path):
    from megatron_gkd.data.teacher_view import teacher_view

    world_size, parallel = LAYOUTS[layout]
    student = vision_student(True)
    rows = rows_of(student, privileged=True)
    changes = {"parallel": parallel, "teacher": {"teacher_kind": "self", "teacher_model": None}}
    found = gloo_world(world_size).run(step, student, None, changes, rows)[0]
    assert_equals(found, *oracle(student, rows, student, list(map(teacher_view, rows)), tmp_path))


class Rows(list):
    """Samples as a data set."""

    def __init__(self, samples):
        super().__init__(replace(sample, row_id=index) for index, sample in enumerate(samples))
        self.lengths = np.array([len(sample.input_ids) for sample in self])
        self.num_labels = np.array([sample.num_labels for sample in self])
        self.num_patches = np.array([9 * len(sample.images) for sample in self])


def write(rank, world_size, student, teacher, changes, samples, folder):
    """What `megatron-gkd score` does."""
    from megatron_gkd.checkpoint_format.cache_manifest import Manifest
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.build_teacher import build_teacher
    from megatron_gkd.training.score import Scorer, write_cache

    recipe = recipe_of(changes)
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoints = {"teacher": Checkpoint.open(str(teacher))}
    source = build_teacher(recipe, mesh, Checkpoint.open(str(student)), checkpoints)
    manifest = Manifest(K, TEMPERATURE, "t", "teacher", vocab_size=301, images="p")
    write_cache(folder, Scorer(recipe, mesh, Rows(samples), source, manifest, 0), 5)
    destroy_mesh()


def test_a_cache_of_rows_with_images_trains_as_the_teacher_that_wrote_it(gloo_world, tmp_path):
    student = vision_student(False)
    rows = rows_of(student)
    packed = {"data": {"packing": True, "max_patches": 20}, "parallel": LAYOUTS["PP2"][1]}
    gloo_world(2).run(write, student, vision_teacher(), packed, rows, tmp_path)
    topk = {"distill": {"gkd_logits_topk": K}}
    live = gloo_world(1).run(step, student, vision_teacher(), topk, rows)
    read = topk | {"teacher": {"teacher_model": None, "teacher_cache": str(tmp_path)}}
    assert_equal_runs(gloo_world(1).run(step, student, None, read, rows), live)
    first = rows[0]
    other = replace(first, images=(image(16, 24, seed=5), *first.images[1:]))  # of the same size
    with pytest.raises(UserError, match="row 1 is not in the teacher cache"):
        gloo_world(1).run(step, student, None, read, [other, *rows[1:]])


def problem_of_cache(rank, world_size, student, folder, limits):
    """Why a cache is refused that was written for the student, if it now has these limits; None where it is not."""
    from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
    from megatron_gkd.config.schema import TeacherSection
    from megatron_gkd.data.cache import hash_tokenizer
    from megatron_gkd.data.vision.comparison import hash_processing
    from megatron_gkd.training.build_teacher import read_manifests

    images, tokenizer = hash_processing(processing_of(student)), vision_tokenizer()
    (folder / FILE).write_text(Manifest(K, 1.0, hash_tokenizer(tokenizer), "teacher", 301, images).text())
    section = TeacherSection(teacher_cache=str(folder))
    try:
        read_manifests(section, tokenizer, None if limits is None else processing_of(student, limits))
    except UserError as error:
        return str(error)


def test_a_cache_of_other_sizes_of_images_is_refused(gloo_world, tmp_path):
    student, message = vision_student(True), "its images were read with other settings than the student's"
    assert gloo_world(1).run(problem_of_cache, student, tmp_path, PixelLimits())[0] is None
    for limits in (PixelLimits(max_pixels=1024), None):
        assert message in gloo_world(1).run(problem_of_cache, student, tmp_path, limits)[0]


def refusal(rank, world_size, samples, teachers, read_images):
    """Why rows are refused that teachers score which read images, or don't; None where they are not."""
    from megatron_gkd.config.schema import TeacherSection
    from megatron_gkd.training.teacher_rows import check_rows

    rows = Rows(samples)
    rows.tags = {sample.tag for sample in samples}
    section = TeacherSection(**teachers)
    checkpoints = [SimpleNamespace(has_images=reads) for reads in read_images]
    try:
        check_rows(section, rows, dict(zip(section.all, checkpoints, strict=True)))
    except UserError as error:
        return str(error)


def test_a_text_teacher_is_refused_where_its_rows_have_images(gloo_world):
    rows = rows_of(vision_student(True))
    one = {"teacher_model": "path"}
    message = "teacher.teacher_model = path: reads text alone, and row 0 of the dataset has images; name a multimodal "
    assert gloo_world(1).run(refusal, rows, one, [False])[0].startswith(message)
    assert gloo_world(1).run(refusal, rows, one, [True])[0] is None
    assert gloo_world(1).run(refusal, [row for row in rows if not row.images], one, [False])[0] is None
    tagged = [replace(row, tag="image" if row.images else "text") for row in rows]
    teachers = [{"tags": [tag], "teacher_model": tag} for tag in ("text", "image")]
    several = {"teachers": teachers, "teacher_tag_key": "subject"}
    assert gloo_world(1).run(refusal, tagged, several, [False, True])[0] is None
    found = gloo_world(1).run(refusal, tagged, several, [True, False])[0]
    assert found.startswith("teacher.teachers[1].teacher_model = image: reads text alone, and row 0")
