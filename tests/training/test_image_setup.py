"""What a run opens for images at its start, and the rows that `generate` writes with them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from training_layouts import recipe_of
from vision_checkpoints import IMAGE_ID, image_row, tiny_vision_checkpoint

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.rows import parse_row
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion
from megatron_gkd.runtime.nodes import Nodes

MESH = SimpleNamespace(is_main=True)


def recipe(student, data, tmp_path, **keys):
    paths = {"dataset": [str(data)], "dataset_cache_dir": str(tmp_path / "cache")}
    return recipe_of(
        {
            "student": {"model": str(student)},
            "teacher": {"teacher_kind": "none"},
            "distill": {"lmbda": 0.0, "sft_alpha": 1.0, "beta": 0.0},
            "data": paths | keys,
        }
    )


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [image_row(tmp_path, (16, 24)), image_row(tmp_path), image_row(tmp_path, (16, 16), (40, 24), seed=4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(Nodes, "from_world", staticmethod(Nodes.alone))


def open_all(recipe):
    from megatron_gkd.training.setup import open_models, open_rows

    models = open_models(recipe, MESH)
    return models, open_rows(recipe, models, "train")[0]


def test_the_students_processing_is_used_for_rows_and_batches(data, tmp_path):
    whole = recipe(tiny_vision_checkpoint("qwen2_5_vl"), data, tmp_path)
    models, dataset = open_all(whole)
    assert [(dataset[row].input_ids == IMAGE_ID).sum() for row in range(3)] == [6, 0, 4 + 15]
    _, limited = open_all(recipe(tiny_vision_checkpoint("qwen2_5_vl"), data, tmp_path, max_pixels=256))
    assert [(limited[row].input_ids == IMAGE_ID).sum() for row in range(3)] == [2, 0, 4 + 2]
    layout = SimpleNamespace(pad_multiple=1, total_multiple=1, virtual_pipeline=None, pipeline=2)
    for stage in range(2):
        groups = {name: SimpleNamespace(rank=lambda: 0, size=lambda: 1) for name in ("dp", "cp")}
        mesh = SimpleNamespace(layout=layout, pp=SimpleNamespace(rank=lambda stage=stage: stage), **groups)
        config = BatchConfig.from_recipe(whole, mesh, 0, models.images)
        assert config.images is models.images and config.needs_pixels is (stage == 0)


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "max_patches"])
def test_a_text_student_has_no_image_keys(name, data, tmp_path):
    keys = {name: 64} | ({"packing": True} if name == "max_patches" else {})
    with pytest.raises(UserError, match=rf"data\.{name} = 64: the student .* reads text alone; leave it out"):
        open_all(recipe(tiny_checkpoint("qwen2"), data, tmp_path, **keys))


def test_the_processors_chat_template_writes_the_images(data, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(tiny_vision_checkpoint("qwen2_5_vl"), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.replace("user", "system")}))
    models, dataset = open_all(recipe(folder, data, tmp_path))
    assert models.tokenizer.chat_template == template.replace("user", "system")
    assert (dataset[0].input_ids == IMAGE_ID).sum() == 6


def test_generated_rows_keep_their_images(data, tmp_path):
    from megatron_gkd.training.generated_rows import GeneratedResponse, RowFormatter

    whole = recipe(tiny_vision_checkpoint("qwen2_5_vl"), data, tmp_path)
    models, dataset = open_all(whole)
    formatter = RowFormatter(whole, dataset, models.tokenizer, "model")
    completion = Completion([5, 2], [0.0, 0.0], "stop", 0)
    rows = formatter.format([GeneratedResponse(row, 0, completion) for row in range(3)])
    assert "images" not in rows[1] and len(parse_row(rows[2], reads_images=True).images) == 2
    generated = tmp_path / "generated.jsonl"
    generated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, again = open_all(recipe(tiny_vision_checkpoint("qwen2_5_vl"), generated, tmp_path))
    for row in range(3):
        assert again[row].images == dataset[row].images
        assert np.array_equal(again[row].input_ids[:-2], dataset[row].input_ids[: len(again[row].input_ids) - 2])


def test_ids_of_a_teachers_images_are_never_sampled(tmp_path):
    from megatron_gkd.training.setup import Models

    teacher = Checkpoint.open(str(tiny_vision_checkpoint("qwen2_5_vl")))
    assert Models(None, {"teacher": teacher}, None, 301).find_reserved_ids() == (290, 291, 292, 293)
    assert (
        Models(None, {"teacher": Checkpoint.open(str(tiny_checkpoint("qwen2")))}, None, 301).find_reserved_ids() == ()
    )


def test_a_checkpoints_processor_is_opened_once(data, tmp_path, monkeypatch):
    from megatron_gkd.data.vision.processor import PixelLimits
    from megatron_gkd.models import checkpoint
    from megatron_gkd.training.build_teacher import open_images
    from megatron_gkd.training.setup import Models

    opened, open_processing = [], checkpoint.open_processing
    monkeypatch.setattr(checkpoint, "open_processing", lambda *a: opened.append(a) or open_processing(*a))
    folder = tiny_vision_checkpoint("qwen2_5_vl")
    whole, teacher = recipe(folder, data, tmp_path), Checkpoint.open(str(folder))
    images = open_images(whole, teacher)
    assert open_images(whole, teacher) is images and len(opened) == 1
    assert Models(None, {"teacher": teacher}, None, 301).find_reserved_ids() == images.reserved_ids
    assert len(opened) == 1
    assert teacher.images(PixelLimits(max_pixels=256)) is not images and len(opened) == 2


def test_a_multimodal_teacher_completes_the_prompts_of_a_text_student(data, tmp_path):
    from megatron_gkd.data.vision.processor import PixelLimits, open_processing
    from megatron_gkd.training.generation_engine import open_teachers_images

    folder = tiny_vision_checkpoint("qwen2_5_vl")
    teacher, whole = Checkpoint.open(str(folder)), recipe(tiny_checkpoint("qwen2"), data, tmp_path)
    assert open_teachers_images(whole, teacher, None) is not None
    assert open_teachers_images(whole, teacher, open_processing(folder)) is not None
    with pytest.raises(UserError, match=r"its image processor has other settings than that of student\.model"):
        open_teachers_images(whole, teacher, open_processing(folder, PixelLimits(max_pixels=256)))
