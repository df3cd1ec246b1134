"""The columns of tokenized rows."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

EMPTY = np.zeros(0, dtype=np.int64)

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),  # labels that are not -100
        "teacher_prompt": datasets.List(datasets.Value("int32")),  # empty where the row has none
        "teacher_length": datasets.Value("int32"),  # of the whole sequence after it; 0 where the row has none
        "tag": datasets.Value("string"),  # empty where no key is configured
        "shortened": datasets.Value("bool"),  # the prompt lost its start, to leave room for a completion
        "dropped": datasets.Value("string"),  # why the row is not used; empty for one that is
        "error": datasets.Value("string"),  # what is wrong with the row; empty unless it is a bad row
    }
)
_IMAGES = datasets.List(
    {
        "location": datasets.Value("string"),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "digest": datasets.Value("string"),
        "frames": datasets.List(datasets.Value("int32")),  # of a video; empty for an image
        "fps": datasets.Value("float64"),
        "num_frames": datasets.Value("int32"),
        "files": datasets.List(datasets.Value("string")),
    }
)
IMAGE_FEATURES = datasets.Features(  # beside FEATURES, where the student reads images
    {
        "images": _IMAGES,
        "teacher_images": _IMAGES,  # those of the teacher's prompt; empty where the row has none
        "num_patches": datasets.Value("int32"),  # of `images` or of `teacher_images`, whichever are more
        "num_videos": datasets.Value("int32"),  # among both
    }
)
IMAGES = ("images", "teacher_images")  # the columns among them that hold images
STATUS = ("shortened", "dropped", "error")  # columns that are not stored with the sample


def dropped_record(reason: str, error: str = "") -> dict[str, Any]:
    """Return the record of a row that is not used. `error` is what is wrong with the row; empty if nothing is."""
    return {
        "input_ids": EMPTY,
        "labels": EMPTY,
        "length": 0,
        "num_labels": 0,
        "teacher_prompt": EMPTY,
        "teacher_length": 0,
        "tag": "",
        "shortened": False,
        "dropped": reason,
        "error": error,
        "images": [],
        "teacher_images": [],
        "num_patches": 0,
        "num_videos": 0,
    }
