"""The loader of a multimodal model: pixels from worker processes, where the model reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batching import ONE_RANK
from vision_checkpoints import image_row, vision_tokenizer, write_image

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.loader import StepLoader, validation_batches
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.data.vision.processor import open_processing
from megatron_gkd.errors import UserError

SIZES = [((16, 24),), (), ((16, 16), (40, 24)), ((8, 8),), (), ((32, 16),)]


@pytest.fixture
def images(folder_of):
    return open_processing(folder_of("qwen2_5_vl"))


@pytest.fixture
def dataset(images, section, write_jsonl, tmp_path) -> TokenizedDataset:
    path = write_jsonl([image_row(tmp_path, *sizes, seed=10 * row) for row, sizes in enumerate(SIZES)])
    return build_dataset(section(path), "train", vision_tokenizer(), RowOptions(vocab_size=301, images=images))[0]


def loader(dataset, images, workers=0, **changes) -> StepLoader:
    defaults = dict(global_batch_size=3, packing=True, max_length=200, images=images, needs_pixels=True)
    config = replace(ONE_RANK, **defaults | changes)
    order = SampleOrder(dataset.sizes, [1.0], seed=0, shuffle=False)
    return StepLoader(dataset, order, config, range(1, 3), num_workers=workers)


def test_workers_decode_the_same_pixels(dataset, images):
    here, there = (list(loader(dataset, images, workers)) for workers in (0, 1))
    for ours, theirs in zip(here, there, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.vision.position_ids, other.vision.position_ids)
            assert one.vision.pixels.keys() == other.vision.pixels.keys() == {"pixel_values", "image_grid_thw"}
            assert all(torch.equal(one.vision.pixels[name], other.vision.pixels[name]) for name in one.vision.pixels)
            assert one.samples[0].images == other.samples[0].images


def test_later_stages_get_no_pixels(dataset, images):
    for microbatches in loader(dataset, images, needs_pixels=False):
        assert all(one.vision is not None and one.vision.pixels == {} for one in microbatches)


def test_patches_limit_packed_microbatches(dataset, images):
    assert dataset.num_patches.tolist() == [24, 0, 16 + 60, 4, 0, 32]
    count = [len(step) for step in loader(dataset, images)]
    assert count == [1, 1]
    for step in loader(dataset, images, max_patches=80):
        for one in step:
            assert len(one.vision.pixels.get("pixel_values", [])) <= 80
    assert [len(step) for step in loader(dataset, images, max_patches=80)] == [2, 1]


def test_an_image_that_is_gone_is_one_line_from_a_worker(dataset, images, tmp_path):
    write_image(tmp_path, 16, 24, 0).unlink()
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"16x24-0\.png: No such file or directory; it was there when the rows were to"
        ):
            list(loader(dataset, images, workers))


def test_validation_pads_with_rows_of_text(dataset, images):
    config = replace(ONE_RANK, global_batch_size=4, images=images, needs_pixels=True)
    steps = list(validation_batches(dataset, config))
    assert [len(step) for step in steps] == [4, 4]
    assert steps[1][-1].vision.pixels == {} and steps[1][-1].num_labels == 0
    rows = sorted(sample.row_id for step in steps for one in step for sample in one.samples)
    assert rows == [-1, -1, 0, 1, 2, 3, 4, 5]
    assert np.array_equal(dataset.lengths, [len(dataset[row].input_ids) for row in range(6)])
