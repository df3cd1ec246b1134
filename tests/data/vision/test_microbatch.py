"""Microbatches of a multimodal model: whole ids, positions and pixels, under every division."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batching import ONE_RANK
from vision_checkpoints import END_ID, START_ID, write_image

from megatron_gkd.data.microbatch import Microbatch, add_pixels, collate, pad_to, shard_context_parallel
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.packing import plan_microbatches
from megatron_gkd.data.prompt import replace_response
from megatron_gkd.data.sample import FROM_DATASET, IGNORED_LABEL, Sample
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.inputs import count_patches

PAD = 0


@pytest.fixture
def samples(processing, tmp_path: Path) -> list[Sample]:
    """Two images, none, one."""
    store = ImageStore(tmp_path)

    def sample(row: int, *sizes: tuple[int, int]) -> Sample:
        images = [store.resolve(str(write_image(tmp_path, *size, seed=row))) for size in sizes]
        ids = [5, 6, 7]
        for image in images:
            ids += [START_ID, *processing.tokens(image), END_ID, 8]
        ids += [9, 10 + row, 11]
        labels = np.full(len(ids), IGNORED_LABEL)
        labels[-3:-1] = ids[-2:]
        return Sample(np.array(ids), labels, FROM_DATASET, row, images=tuple(images))

    return [sample(0, (16, 24), (16, 16)), sample(1), sample(2, (24, 32))]


def whole_of(samples, processing) -> Microbatch:
    return pad_to(collate(samples, pad_multiple=4, pad_token_id=PAD, images=processing), 104, PAD)


def test_positions_are_those_of_each_row_and_count_on_in_the_padding(samples, processing):
    whole = whole_of(samples, processing)
    assert whole.vision is not None and torch.equal(whole.vision.whole_input_ids, whole.input_ids)
    positions = whole.vision.position_ids.numpy().reshape(processing.position_rows, -1)
    assert whole.vision.position_ids.shape == ((3, 1, 104) if len(positions) == 3 else (1, 104))
    bounds = whole.cu_seqlens.tolist()
    for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
        length = len(sample.input_ids)
        own = processing.positions(sample.input_ids, sample.images)
        assert np.array_equal(positions[:, start : start + length], own)
        padding = positions[:, start + length : end]
        assert np.array_equal(padding, own[:, -1:] + 1 + np.arange(padding.shape[1]))
    assert np.array_equal(positions[:, bounds[-2] :], np.tile(np.arange(104 - bounds[-2]), (len(positions), 1)))
    text = positions[:, bounds[1] : bounds[2]]
    assert np.array_equal(text, np.tile(np.arange(text.shape[1]), (len(positions), 1)))


def test_context_parallel_ranks_have_their_positions_and_all_ids_and_pixels(samples, processing):
    whole = add_pixels(whole_of(samples, processing), processing)
    shards = [shard_context_parallel(whole, rank, 2) for rank in range(2)]
    assert sorted(position for one in shards for position in one.vision.position_ids[0].flatten().tolist()) == sorted(
        whole.vision.position_ids[0].flatten().tolist()
    )
    for one in shards:
        assert one.vision.position_ids.shape[-1] == one.input_ids.shape[1] == 52
        assert torch.equal(one.vision.whole_input_ids, whole.input_ids)
        assert one.vision.pixels is whole.vision.pixels
        # Tokens and positions are selected alike.
        for token, position in zip(one.input_ids[0], one.vision.position_ids.flatten(0, -2).T, strict=True):
            at = (whole.input_ids[0] == token) & (whole.vision.position_ids.flatten(0, -2).T == position).all(1)
            assert at.any()


def test_pixels_are_of_all_images_in_order(samples, processing):
    pixels = add_pixels(whole_of(samples, processing), processing).vision.pixels
    each = [processing.pixels([image]) for sample in samples for image in sample.images]
    for name, value in pixels.items():
        assert torch.equal(value, torch.cat([one[name] for one in each]))
    assert add_pixels(whole_of(samples[1:2], processing), processing).vision.pixels == {}


def test_arrays_and_devices_keep_the_inputs(samples, processing):
    whole = add_pixels(whole_of(samples, processing), processing)
    for copy in (Microbatch.from_arrays(whole.to_arrays()), whole.to("cpu")):
        assert torch.equal(copy.vision.position_ids, whole.vision.position_ids)
        assert copy.vision.pixels.keys() == whole.vision.pixels.keys()
        assert all(torch.equal(copy.vision.pixels[name], value) for name, value in whole.vision.pixels.items())


def test_pixels_are_decoded_where_they_are_read_alone(samples, processing):
    config = replace(ONE_RANK, global_batch_size=3, packing=True, max_length=200, images=processing)
    lengths = [len(sample.input_ids) for sample in samples]
    for needs_pixels in (False, True):
        planner = MicrobatchPlanner(replace(config, needs_pixels=needs_pixels))
        (microbatch,) = planner.make_microbatches(lengths, samples.__getitem__)
        assert bool(microbatch.vision.pixels) is needs_pixels
    (text,) = MicrobatchPlanner(replace(config, images=None)).make_microbatches(lengths, samples.__getitem__)
    assert text.vision is None


def test_a_completion_continues_behind_the_largest_position(samples, processing):
    row = replace_response(samples[0], [20, 21, 22])
    assert row.images == samples[0].images
    positions = processing.positions(row.input_ids, row.images)
    largest = positions[:, :-3].max()
    assert np.array_equal(positions[:, -3:], np.tile(largest + 1 + np.arange(3), (len(positions), 1)))


def test_packing_counts_patches(samples, processing):
    patches = [count_patches(sample, processing) for sample in samples]
    assert patches[1] == 0 and patches[0] > 0 and patches[2] > 0
    lengths = [len(sample.input_ids) for sample in samples]
    config = replace(ONE_RANK, packing=True, max_length=300)
    assert len(plan_microbatches(lengths, config, patches)[0]) == 1
    bins = plan_microbatches(lengths, replace(config, max_patches=sum(patches) - 1), patches)[0]
    assert sorted(map(len, bins)) == [1, 2]


def test_a_row_of_too_many_patches_goes_alone_with_text():
    config = replace(ONE_RANK, packing=True, max_length=100, max_patches=10)
    assert plan_microbatches([20, 20, 20, 20], config, [30, 4, 7, 0]) == [[[0, 3], [1], [2]]]
    assert plan_microbatches([20, 20, 20, 20], config, [6, 4, 7, 3]) == [[[0, 1], [2, 3]]]
