"""The image processor of a multimodal checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError

_RESERVED = re.compile(r"(image|video|audio|vision|boi|eoi|boa|eoa).*token_(id|index)$")


@dataclass(frozen=True)
class PixelLimits:
    """Sizes to which images are scaled; None: the checkpoint's own.

    Attributes:
        min_pixels: fewest pixels (height times width) of an image.
        max_pixels: most pixels.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None


def open_processing(folder: Path, limits: PixelLimits | None = None) -> ImageProcessing | None:
    """Open what a checkpoint's processor makes of images; None for a text model.

    Raises:
        UserError: there is no image processor that can be used, or it has no such limits.
    """
    # They import this module.
    from megatron_gkd.data.vision.grid_processing import GridProcessing
    from megatron_gkd.data.vision.tile_processing import TileProcessing

    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config") is None:
        return None
    image_processor = open_image_processor(folder)
    limits = limits or PixelLimits()
    if "image_grid_thw" in image_processor.model_input_names:
        return GridProcessing(folder, limits)
    for name in ("min_pixels", "max_pixels"):
        if (value := getattr(limits, name)) is not None:
            raise UserError(
                f"data.{name} = {value}: the image processor of {folder} ({type(image_processor).__name__}) divides "
                "images into tiles of one size and has no such limit; leave it out"
            )
    return TileProcessing(folder)


def open_image_processor(folder: Path) -> Any:
    """Open a checkpoint's image processor, in its Pillow form where torchvision is missing.

    Raises:
        UserError: it cannot be opened.
    """
    # transformers' own name for it, `transformers.AutoImageProcessor`, wants torchvision for all of them.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, **_size_of_older_form(folder))
    except Exception as error:  # transformers raises many kinds of error for a file that it cannot use
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{folder}: its image processor cannot be opened: {lines[0]}") from error


def _size_of_older_form(folder: Path) -> dict[str, Any]:
    """Return the argument `size` of an image processor whose file has min_pixels and max_pixels instead.

    Without it transformers 5.12 writes these two into the class, for all checkpoints that are opened after it.
    """
    file = folder / "preprocessor_config.json"
    keys = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "size" in keys or None in (keys.get("min_pixels"), keys.get("max_pixels")):
        return {}
    return {"size": {"shortest_edge": keys["min_pixels"], "longest_edge": keys["max_pixels"]}}


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint's processor; None where the tokenizer's is that of the processor, too.

    Checkpoints of the older form have two: the processor's, which writes images, in chat_template.json.
    """
    file = folder / "chat_template.json"
    return json.loads(file.read_text(encoding="utf-8"))["chat_template"] if file.is_file() else None


def read_config(folder: Path) -> PretrainedConfig:
    """Read a checkpoint's config.json."""
    return AutoConfig.from_pretrained(folder)


def find_reserved_ids(config: PretrainedConfig) -> set[int]:
    """Return the ids of a configuration that stand for images, videos and audio, or mark their ends."""
    ids = {value for key, value in config.to_dict().items() if _RESERVED.search(key) and isinstance(value, int)}
    return {id_ for id_ in ids if id_ >= 0}
