"""Rows with images, and what transformers says of them."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from vision_checkpoints import IMAGE_ID, VIDEO_ID, tiny_vision_checkpoint, vision_checkpoint, write_image

from megatron_gkd.data.sample import Sample, shift_labels
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import PixelLimits, open_processing


@functools.cache
def image_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="test-images-"))


def vision_teacher() -> Path:
    """The smallest multimodal checkpoint that vLLM has on a CPU: heads of 32."""
    return _checkpoint(seed=5)


@functools.cache
def _checkpoint(seed: int) -> Path:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    keys = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    return vision_checkpoint(Path(tempfile.mkdtemp(prefix="tiny-vision-teacher-")), "qwen2_5_vl", seed, **keys)


@functools.cache
def vision_student(is_same: bool) -> Path:
    """A student; unless `is_same`, with another placeholder than the teacher's, and smaller images."""
    folder = tiny_vision_checkpoint("qwen2_5_vl", 2)
    if not is_same:
        copied = Path(tempfile.mkdtemp(prefix="tiny-vision-student-")) / "model"
        shutil.copytree(folder, copied)
        folder = copied
        edit_json(folder / "config.json", image_token_id=VIDEO_ID, video_token_id=IMAGE_ID)
        edit_json(folder / "preprocessor_config.json", size={"shortest_edge": 64, "longest_edge": 512})
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|image_pad|>", "<|video_pad|>"))
    return folder


@functools.cache
def other_processor(checkpoint: Path) -> Path:
    """A copy of a Qwen-VL checkpoint with another placeholder, larger patches and smaller images.

    Its weights don't fit its configuration: it is there for what its processor makes of images.
    """
    folder = Path(tempfile.mkdtemp(prefix="other-processor-")) / "model"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "config.json", image_token_id=VIDEO_ID, video_token_id=IMAGE_ID)
    edit_json(folder / "preprocessor_config.json", patch_size=8, size={"shortest_edge": 256, "longest_edge": 1024})
    return folder


def edit_json(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def image(height: int = 16, width: int = 24, seed: int = 0) -> Image:
    return ImageStore(image_folder()).resolve(str(write_image(image_folder(), height, width, seed)))


@functools.cache
def processing_of(checkpoint: Path, limits: PixelLimits | None = None) -> ImageProcessing:
    found = open_processing(checkpoint, limits)
    assert found is not None
    return found


def image_sample(
    processing: ImageProcessing, *parts: int | Image, response: int = 4, seed: int = 0, **fields
) -> Sample:
    """A row whose prompt has so many random tokens of text, or an image, in each part."""
    words = np.random.default_rng(seed)
    ids: list[int] = []
    for part in parts:
        ids += words.integers(4, 280, part).tolist() if isinstance(part, int) else processing.tokens(part)
    ids += words.integers(4, 280, response).tolist()
    is_response = np.arange(len(ids)) >= len(ids) - response
    images = tuple(part for part in parts if isinstance(part, Image))
    labels = shift_labels(np.array(ids), is_response)
    return Sample(np.array(ids), labels, "dataset", seed, images=images, **fields)


@functools.cache
def vision_model(path: Path):
    return open_vision_model(path).eval()


def open_vision_model(path: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def vision_logits(model, processing: ImageProcessing, input_ids: Sequence[int], images: Sequence[Image]) -> Tensor:
    """The logits [L, V] of transformers' model, whose positions are its own."""
    ids = torch.as_tensor(np.asarray(input_ids))[None]
    pixels = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in processing.pixels(images).items()
    }
    types = {}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        types = {"mm_token_type_ids": (ids == processing.placeholder_id).int()}
    return model(input_ids=ids, use_cache=False, **types, **pixels).logits[0]


@torch.no_grad()
def vision_log_probs(path: Path, sample: Sample) -> Tensor:
    """fp64 [n, V], at the labels of a sample that the teacher reads as it is."""
    logits = vision_logits(vision_model(path), processing_of(path), sample.input_ids, sample.images)
    return logits[torch.from_numpy(sample.label_positions)].double().log_softmax(-1)
