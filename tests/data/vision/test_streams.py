"""Streamed rows with images: the same microbatches, pixels included, as those of tokenized rows."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
from batching import ONE_RANK
from vision_checkpoints import vision_tokenizer, write_image

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.streams.opening import Streams
from megatron_gkd.data.streams.streamed_rows import StreamedRows, StreamProgress
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.data.vision.processor import open_processing


@pytest.fixture
def rows(tmp_path):
    def row(index):
        images = [str(write_image(tmp_path / "images", 16 + 8 * (index % 3), 24, seed=index))] * (index % 2)
        teacher_prompt = "<image>w7" if images else f"w{index + 10}"
        messages = [{"role": "user", "content": "<image>" * len(images) + f"w{index}"}]
        return {
            "messages": [*messages, {"role": "assistant", "content": "w3 w4"}],
            "images": images,
            "teacher_prompt": teacher_prompt,
        }

    return [row(index) for index in range(8)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_microbatches_are_those_of_tokenized_rows(folder_of, section, write_jsonl, tmp_path, rows, kind):
    path = write_jsonl(rows)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        features = datasets.Dataset.from_list(rows).features | {"images": datasets.List(datasets.Image())}
        datasets.Dataset.from_list(rows).cast(datasets.Features(features)).to_parquet(path, batch_size=2)
    images = open_processing(folder_of("qwen2_5_vl"))
    options, tokenizer = RowOptions(vocab_size=301, images=images), vision_tokenizer("qwen2_5_vl")
    dataset, _ = build_dataset(section(path), "train", tokenizer, options)
    order = SampleOrder(dataset.sizes, [1.0], 0, shuffle=False)
    streams = Streams.open(section(path, shuffle=False), tokenizer, options)
    feed = streams.feed(streams.start(), seed=0, rows_ahead=8)
    streamed = StreamedRows(feed, 4, StreamProgress(streams.start()), run_on_main=lambda work: work())
    config = replace(
        ONE_RANK, global_batch_size=4, packing=True, max_length=256, images=images, needs_pixels=True, max_patches=64
    )
    steps = range(1, 4)
    expected = list(StepLoader(dataset, order, config, steps))
    for ours, theirs in zip(StepLoader(streamed, streamed, config, steps), expected, strict=True):
        assert [one.input_ids.tolist() for one in ours] == [one.input_ids.tolist() for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            teacher = [sample.teacher_images for sample in other.samples]
            assert [sample.teacher_images for sample in one.samples] == teacher
            assert [sample.images for sample in one.samples] == [sample.images for sample in other.samples]
            assert torch.equal(one.vision.position_ids, other.vision.position_ids)
            assert one.vision.pixels.keys() == other.vision.pixels.keys() == {"pixel_values", "image_grid_thw"}
            assert all(torch.equal(one.vision.pixels[name], other.vision.pixels[name]) for name in one.vision.pixels)
    assert any(sample.teacher_images for step in expected for one in step for sample in one.samples)
