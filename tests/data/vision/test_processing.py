"""What our processing says of images is what transformers' own processor makes of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers import BatchFeature
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from vision_checkpoints import (
    IMAGE_ID,
    vision_config,
    vision_processor,
    vision_tokenizer,
    write_image,
)

from megatron_gkd.data.vision import processor as processor_module
from megatron_gkd.data.vision import tile_processing
from megatron_gkd.data.vision.files import ImageStore, load_image
from megatron_gkd.data.vision.processor import PixelLimits, open_image_processor, open_processing
from megatron_gkd.errors import UserError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm4v_moe", "internvl")
SIZES = [(16, 24), (4, 5), (97, 33), (8, 64), (200, 200), (31, 7), (16, 16)]


@pytest.fixture
def images(tmp_path: Path):
    store = ImageStore(tmp_path)
    return [store.resolve(str(write_image(tmp_path, *size, seed=i))) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_those_of_the_processor(family, folder_of, images):
    processing = open_processing(folder_of(family))
    processor = vision_processor(family, open_image_processor(folder_of(family)))
    parts = [part for image in images for part in ({"type": "image"}, {"type": "text", "text": "w1"})]
    text = vision_tokenizer(family).apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    opened = [Pillow.open(image.location) for image in images]
    expected = dict(processor(text=[text], images=opened, return_tensors="pt"))

    rest = iter(images)
    found = []
    for token in processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
        found += processing.tokens(next(rest)) if token == processing.placeholder_id else [token]
    assert found == expected["input_ids"][0].tolist()
    assert len(found) > len(images) * 4

    pixels = processing.pixels(images)
    assert set(pixels) == set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    for name, value in pixels.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name

    patches = sum(processing.num_patches(image) for image in images)
    if family == "internvl":  # tiles of 16 x 16 pixels with patches of 4 x 4
        assert patches == len(pixels["pixel_values"]) * 16
    else:
        assert patches == len(pixels["pixel_values"])
    assert processing.pixels([]) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_model(family, folder_of, images):
    processing = open_processing(folder_of(family))
    ids = np.array([5, *(id_ for image in images for id_ in (292, *processing.tokens(image), 293)), 6, 7])
    positions = processing.positions(ids, images)
    assert positions.dtype == np.int64 and positions.shape == (processing.position_rows, len(ids))
    text = processing.positions(np.arange(4), [])
    assert (text == np.arange(4)).all() and text.shape == (processing.position_rows, 4)
    if family == "internvl":
        assert processing.position_rows == 1 and (positions == np.arange(len(ids))).all()
        return
    config = vision_config(family)
    with torch.device("meta"):
        model = MODEL_MAPPING[type(config)](config)
    tensor = torch.from_numpy(ids)[None]
    grids = processing.pixels(images)["image_grid_thw"]
    expected, _ = model.get_rope_index(
        input_ids=tensor, mm_token_type_ids=(tensor == IMAGE_ID).int(), image_grid_thw=grids
    )
    assert processing.position_rows == 3 and np.array_equal(positions, expected[:, 0].numpy())
    assert positions.max() < len(ids) - 1  # an image takes fewer positions than tokens


@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm4v"])
def test_limits_hold_for_pixels_and_tokens_alike(family, folder_of, images):
    processing = open_processing(folder_of(family), PixelLimits(min_pixels=16 * 16, max_pixels=32 * 32))
    free = open_processing(folder_of(family))
    grids = processing.pixels(images)["image_grid_thw"]
    areas = grids[:, 1] * grids[:, 2] * 16  # patches of 4 x 4
    assert areas.max() <= 32 * 32 and areas.min() >= 16 * 16
    assert [len(processing.tokens(image)) * 4 for image in images] == grids.prod(1).tolist()
    assert [len(free.tokens(image)) for image in images] != [len(processing.tokens(image)) for image in images]
    assert free.settings != processing.settings


def test_a_limit_may_lie_outside_the_checkpoints_own(folder_of, images):
    below = open_processing(folder_of("qwen2_5_vl"), PixelLimits(max_pixels=32))  # its least are 64
    assert max(below.num_patches(image) for image in images) <= 8


def test_one_checkpoints_sizes_are_not_those_of_the_next(tmp_path):
    def size_of(name: str, **keys) -> tuple[int, int]:
        keys |= {"image_processor_type": "Qwen2VLImageProcessor"}
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(keys))
        size = open_image_processor(tmp_path / name).size
        return size.shortest_edge, size.longest_edge

    default = size_of("default")
    assert size_of("older", min_pixels=784, max_pixels=7840) == (784, 7840)
    assert size_of("default again") == default != (784, 7840)
    assert size_of("newer", size={"shortest_edge": 64, "longest_edge": 640}) == (64, 640)


def test_tiles_have_no_limits(folder_of):
    with pytest.raises(UserError, match=r"data\.max_pixels = 64: the image processor of .*leave it out"):
        open_processing(folder_of("internvl"), PixelLimits(max_pixels=64))


def test_no_processing_for_a_text_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert open_processing(tmp_path) is None


def test_an_unknown_processor_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl", "vision_config": {}}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(UserError, match="its image processor cannot be opened: "):
        open_processing(tmp_path)


@pytest.mark.parametrize(
    ("family", "reserved"),
    [
        ("qwen2_5_vl", (290, 291, 292, 293)),
        ("glm4v", (290, 291, 292, 293, 294, 295)),
        ("internvl", (290, 291, 292, 293)),
    ],
)
def test_reserved_ids(family, reserved, folder_of):
    assert open_processing(folder_of(family)).reserved_ids == reserved


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_it_can_be_pickled_after_use(family, folder_of, images):
    processing = open_processing(folder_of(family))
    expected = processing.tokens(images[0])
    content = pickle.dumps(processing)
    assert len(content) < 1000
    assert pickle.loads(content).tokens(images[0]) == expected


class LlamaTiles(GotOcr2ImageProcessorPil):
    """As Llama 4's, which exists with torchvision alone: two tiles and the whole for a wide image, in bfloat16."""

    def __call__(self, images, **_):
        wide = [image.width > 336 for image in images]
        pixels = torch.ones(sum(3 if one else 1 for one in wide), 3, 336, 336, dtype=torch.bfloat16)
        ratios = torch.tensor([[1, 2] if one else [1, 1] for one in wide])
        return BatchFeature({"pixel_values": pixels, "aspect_ratios": ratios})


def test_llama_4_separates_tiles(folder_of, tmp_path, monkeypatch):
    for module in (tile_processing, processor_module):
        monkeypatch.setattr(module, "open_image_processor", lambda _: LlamaTiles())
    processing = open_processing(folder_of("llama4"))
    start, end, whole, beside, below = 292, 293, 294, 295, 296
    patches = [IMAGE_ID] * 4  # 4 x 4 patches of a tile, of which 2 x 2 are one token
    store = ImageStore(tmp_path)
    small, wide = (store.resolve(str(write_image(tmp_path, *size))) for size in ((16, 24), (16, 400)))
    assert processing.placeholder_id == whole
    assert processing.tokens(small) == [start, whole, *patches, end]
    assert processing.tokens(wide) == [start, *patches, beside, *patches, below, whole, *patches, end]
    assert [processing.num_patches(image) for image in (small, wide)] == [16, 48]
    assert set(processing.reserved_ids) == {IMAGE_ID, start, end, whole, beside, below}
    pixels = processing.pixels([small, wide])
    assert pixels["pixel_values"].shape == (4, 3, 336, 336) and pixels["pixel_values"].dtype == torch.float32


def test_a_changed_image_is_found(folder_of, images, tmp_path):
    processing = open_processing(folder_of("qwen3_vl"))
    write_image(tmp_path / "other", *SIZES[0], seed=99).replace(images[0].location)
    with pytest.raises(UserError, match="the image has changed since the rows were tokenized"):
        processing.pixels(images[:1])
    Path(images[1].location).unlink()
    with pytest.raises(UserError, match="No such file or directory; it was there when"):
        processing.pixels(images[1:2])


def test_images_are_upright(folder_of, tmp_path):
    turned = Pillow.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    image = ImageStore(tmp_path).resolve("turned.png")
    assert (image.height, image.width) == (24, 16)
    assert load_image(image).size == (16, 24)
    assert open_processing(folder_of("qwen3_vl")).pixels([image])["image_grid_thw"].tolist() == [[1, 6, 4]]
