"""What transformers' own video processors make of small videos: `video_golden.json` is what this script writes.

They need torchvision, so the script runs where it is installed: ``PYTHONPATH=tests python tests/video_golden.py``. The
stored values are of transformers 5.19 with torchvision 0.28, whose processors compute what those of 5.12 do.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from vision_checkpoints import save_vision_processor, vision_config, vision_tokenizer

FILE = Path(__file__).with_name("video_golden.json")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEOS = [(5, 16, 24, 2.0), (4, 97, 33, 0.5), (8, 64, 40, 24.0)]
"""Number of frames, height, width, and frames per second."""
SAMPLED = [(30, 10.0, 2.0), (7, 25.0, 2.0), (100, 8.0, 1.5), (3000, 30.0, 10.0), (2, 1.0, 2.0)]
"""Number of frames, how many there are per second, and how many are wanted."""


def make_frames(number: int, height: int, width: int) -> np.ndarray:
    """Return frames that are the same everywhere, uint8 [number, height, width, 3]."""
    t, y, x, c = np.ogrid[:number, :height, :width, :3]
    return ((t * 37 + y * 11 + x * 7 + c * 53 + (x * y) % 31 * 3) % 256).astype(np.uint8)


def count_runs(ids: list[int]) -> list[list[int]]:
    """Return each id with how often it follows itself."""
    return [[id_, len(list(run))] for id_, run in itertools.groupby(ids)]


def summarize(values: torch.Tensor) -> dict[str, Any]:
    """Return a few numbers that tell values from others."""
    flat = values.double().flatten()
    weights = torch.arange(len(flat), dtype=torch.float64) % 97
    picked = flat[:: max(len(flat) // 16, 1)].tolist()
    return {"shape": list(values.shape), "weighted": float((flat * weights).mean()), "picked": picked}


def _processor(family: str, folder: Path) -> Any:
    save_vision_processor(folder, family)
    vision_config(family).save_pretrained(folder)
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    video = "Qwen3VL" if family == "qwen3_vl" else "Qwen2VL"
    keys = json.loads((folder / "preprocessor_config.json").read_text())
    names_of_keys = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std")
    keys = {name: keys[name] for name in names_of_keys}
    tokenizer = vision_tokenizer(family)
    return getattr(transformers, f"{names[family]}Processor")(
        image_processor=transformers.AutoImageProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(**keys),
        chat_template=tokenizer.chat_template,
    )


def _record(family: str, folder: Path) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from transformers.video_utils import VideoMetadata

    processor, config = _processor(family, folder), vision_config(family)
    with torch.device("meta"):
        model = MODEL_MAPPING[type(config)](config)
    metadata = [dict(total_num_frames=n, fps=fps, frames_indices=list(range(n))) for n, _, _, fps in VIDEOS]
    frames = [make_frames(*video[:3]) for video in VIDEOS]
    text = "".join("w1 <|vision_start|><|video_pad|><|vision_end|>" for _ in VIDEOS) + " w2"
    found = processor(text=[text], videos=frames, video_metadata=metadata, do_sample_frames=False, return_tensors="pt")
    ids = found["input_ids"]
    seconds = found.get("second_per_grid_ts")
    options = {} if seconds is None else {"second_per_grid_ts": torch.as_tensor(seconds)}
    positions, _ = model.get_rope_index(
        input_ids=ids, mm_token_type_ids=2 * (ids == 291).int(), video_grid_thw=found["video_grid_thw"], **options
    )
    grids, replaced = found["video_grid_thw"], []
    for index, values in enumerate(metadata):
        of_video = {"video_grid_thw": grids, "video_metadata": [VideoMetadata(**values)] * len(metadata)}
        replaced.append(processor.replace_video_token(of_video, index))
    sample = processor.video_processor.sample_frames
    sampled = [
        [int(i) for i in sample(VideoMetadata(total_num_frames=n, fps=fps), fps=wanted)] for n, fps, wanted in SAMPLED
    ]
    return {
        "ids": count_runs(ids[0].tolist()),
        "positions": summarize(positions[:, 0]),
        "grids": grids.tolist(),
        "texts": replaced,
        "pixels": summarize(found["pixel_values_videos"]),
        "sampled": sampled,
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        golden = {family: _record(family, Path(made) / family) for family in FAMILIES}
    FILE.write_text(json.dumps(golden) + "\n")
