"""Every length that a row may be cut to, under every strategy: images stay whole, or the row is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from vision_checkpoints import vision_tokenizer, write_image

from megatron_gkd.data.prompt import PromptLimits, prompt_length
from megatron_gkd.data.report import IMAGE_CUT
from megatron_gkd.data.sample import FROM_DATASET, IGNORED_LABEL, Sample
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import from_record
from megatron_gkd.data.vision.placeholders import expand_placeholders
from megatron_gkd.data.vision.processor import open_processing


@pytest.fixture
def row(tmp_path) -> dict:
    """Two turns with an image each, text around them, and a prompt of the teacher's own with two."""
    images = [str(write_image(tmp_path, 16, 24, seed=seed)) for seed in range(4)]
    messages = [
        {"role": "user", "content": "w1 w2<image>w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6<image>w7 w8"},
        {"role": "assistant", "content": "w9 w10 w11"},
    ]
    return {
        "messages": messages,
        "images": images[:2],
        "teacher_prompt": "<image>w12<image>",
        "teacher_images": images[2:],
    }


def sample_of(record: dict) -> Sample:
    images, teacher_images = (tuple(map(from_record, record[name])) for name in ("images", "teacher_images"))
    has_own = record["teacher_length"] > 0
    return Sample(
        np.asarray(record["input_ids"]),
        np.asarray(record["labels"]),
        FROM_DATASET,
        0,
        np.asarray(record["teacher_prompt"]) if has_own else None,
        images=images,
        teacher_images=teacher_images if has_own else None,
    )


@pytest.mark.parametrize("strategy", ["left", "right", "delete"])
@pytest.mark.parametrize("loss_scale", ["last_round", "default"])
@pytest.mark.parametrize("shortens_prompts", [False, True])
def test_images_are_whole_in_every_row_that_is_used(
    strategy, loss_scale, shortens_prompts, row, section, folder_of, tmp_path
):
    processing = open_processing(folder_of("qwen2_5_vl"))
    used, cut = [], 0
    for length in range(2, 70):
        limits = PromptLimits(length, 100) if shortens_prompts else None
        options = RowOptions(prompt_limits=limits, vocab_size=301, images=processing)
        max_length = 100 if shortens_prompts else length
        made = section(
            max_length=max_length, teacher_max_length=100, truncation_strategy=strategy, loss_scale=loss_scale
        )
        tokenize = RowTokenizer(vision_tokenizer(), True, made, options, ImageStore(tmp_path))
        columns = tokenize({"text": [json.dumps(row)]})
        record = {name: column[0] for name, column in columns.items()}
        assert record["error"] == ""
        cut += record["dropped"] == IMAGE_CUT
        if record["dropped"]:
            continue
        used.append(length)
        sample = sample_of(record)
        for one in (sample, teacher_view(sample)):
            prompt = one.input_ids[: prompt_length(one.labels)]
            for ids in (one.input_ids, prompt):
                assert (ids == processing.placeholder_id).sum() == 6 * len(one.images)
            trained = one.label_positions
            assert np.array_equal(one.labels[trained], one.input_ids[trained + 1])
    assert used and used[-1] == 69  # a long row is used as it is
    # Where the end is cut and the last response alone is trained on, that is gone before an image is.
    has_cut = strategy != "delete" and (shortens_prompts or (strategy, loss_scale) != ("right", "last_round"))
    assert (cut > 0) == has_cut


def test_what_a_placeholder_predicts_the_last_of_its_tokens_does(folder_of, tmp_path):
    processing = open_processing(folder_of("internvl"))
    image = ImageStore(tmp_path).resolve(str(write_image(tmp_path, 16, 16)))
    tokens = processing.tokens(image)
    ids, labels = expand_placeholders(
        np.array([5, processing.placeholder_id, 7, 8]),
        np.array([IGNORED_LABEL, 7, 8, IGNORED_LABEL]),
        [image],
        processing,
    )
    assert ids.tolist() == [5, *tokens, 7, 8]
    assert labels.tolist() == [IGNORED_LABEL] * len(tokens) + [7, 8, IGNORED_LABEL]
