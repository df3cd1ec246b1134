"""What a multimodal checkpoint is read as: whether its head is tied, and which layouts it can have."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families.vision import open_reference
from layouts import PP2
from safetensors.torch import load_file, save_file
from vision.vision_runs import build
from vision_checkpoints import tiny_vision_checkpoint

from megatron_gkd.errors import UserError

VPP2 = {"virtual_pipeline_model_parallel_size": 2}


def changed(folder, family: str, *, top: bool | None, text: bool | None, has_head: bool):
    """Return a copy of a checkpoint with other values of tie_word_embeddings, and with a head or without."""
    shutil.copytree(tiny_vision_checkpoint(family, seed=2), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for place, value in ((config, top), (config["text_config"], text)):
        place.pop("tie_word_embeddings", None)
        if value is not None:
            place["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(config))
    if not has_head:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "top", "text", "has_head"),
    [
        ("qwen3_vl", None, True, True),
        ("qwen3_vl", False, True, True),
        ("qwen3_vl", True, False, False),
        ("internvl", None, None, True),  # transformers' default is a tied head
        ("internvl", None, False, False),
    ],
)
def test_heads_are_those_that_transformers_reads(family, top, text, has_head, gloo_world, tmp_path):
    """mcore-bridge goes by the language model's configuration, and leaves a head uninitialized where that is wrong."""
    path = changed(tmp_path, family, top=top, text=text, has_head=has_head)
    model = open_reference(path)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    found = gloo_world(1).run(read_model, path)[0]
    assert found["is_tied"] == is_tied == (not has_head)
    assert torch.equal(found["head"], model.lm_head.weight)


def read_model(rank, world_size, path):
    from megatron_gkd.runtime.mesh import destroy_mesh

    student, *_ = build(path, None, {})
    destroy_mesh()
    vocab_size = student.model.checkpoint.vocab_size
    return {"is_tied": student.model.checkpoint.is_tied, "head": student.model.head_weight[:vocab_size]}


def test_a_missing_head_is_refused(tmp_path):
    from megatron_gkd.models.checkpoint import Checkpoint

    path = changed(tmp_path, "qwen3_vl", top=False, text=None, has_head=False)
    with pytest.raises(UserError, match=r"no safetensors file has lm_head\.weight"):
        Checkpoint.open(str(path))


def test_a_first_stage_with_too_few_layers_is_refused(gloo_world):
    path = tiny_vision_checkpoint("qwen3_vl", seed=2)
    with pytest.raises(UserError, match="the first of 4 pipeline stages has 1 layers") as error:
        gloo_world(2).run(read_model_in_stages, path)
    assert "\n" not in str(error.value)


def read_model_in_stages(rank, world_size, path):
    from megatron_gkd.runtime.mesh import destroy_mesh

    try:
        build(path, None, {"parallel": PP2 | VPP2})
    finally:
        destroy_mesh()
