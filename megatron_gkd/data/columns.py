"""The columns of tokenized rows."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

EMPTY, NO_WEIGHTS = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),  # labels that are not -100
        "teacher_prompt": datasets.List(datasets.Value("int32")),  # empty where the row has none
        "label_weights": datasets.List(datasets.Value("float32")),  # see `Sample`; empty where all are 1
        "response_start": datasets.Value("int32"),  # see `Sample`; -1 for None
        "teacher_length": datasets.Value("int32"),  # of the whole sequence after it; 0 where the row has none
        "tag": datasets.Value("string"),  # empty where no key is configured
        "form": datasets.Value("string"),  # that the row is written in; see `recognize`
        "truncated": datasets.Value("bool"),  # the row was longer than a limit
        "shortened": datasets.Value("bool"),  # the prompt lost its start, to be within max_prompt_length
        "conversation": datasets.Value("bool"),  # the chat template's end of a turn ends its completions
        "special": datasets.Value("string"),  # a special token in a message; see `SpecialTexts.find`
        "dropped": datasets.Value("string"),  # why the row is not used; empty for one that is
        "error": datasets.Value("string"),  # what is wrong with the row; empty unless it is a bad row
        "batch_row": datasets.Value("int32"),  # index, in its batch, of the row that the sample is made of
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
SOURCE_ROW = {"source_row": datasets.Value("int64")}  # the number, in the source's files, of the row behind a sample
STATUS = (  # columns that are not stored with the sample
    "form",
    "truncated",
    "shortened",
    "conversation",
    "special",
    "dropped",
    "error",
    "batch_row",
)


def dropped_record(reason: str, error: str = "") -> dict[str, Any]:
    """Return the record of a row that is not used. `error` is what is wrong with the row; empty if nothing is."""
    return {
        "input_ids": EMPTY,
        "labels": EMPTY,
        "length": 0,
        "num_labels": 0,
        "teacher_prompt": EMPTY,
        "label_weights": NO_WEIGHTS,
        "response_start": -1,
        "teacher_length": 0,
        "tag": "",
        "form": "",
        "truncated": False,
        "shortened": False,
        "conversation": False,
        "special": "",
        "dropped": reason,
        "error": error,
        "images": [],
        "teacher_images": [],
        "num_patches": 0,
        "num_videos": 0,
    }
