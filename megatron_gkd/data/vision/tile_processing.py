"""Processors that divide an image into tiles of one size: InternVL and Llama 4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from megatron_gkd.data.vision.files import load_image
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processor import find_reserved_ids, open_image_processor, read_config
from megatron_gkd.errors import UserError


@dataclass(frozen=True)
class _Expansion:
    """The ids that stand for an image of one size, and its number of patches."""

    tokens: list[int]
    num_patches: int


@dataclass(eq=False)
class TileProcessing:
    """What such a processor makes of images. It is pickled into worker processes without what it has opened.

    Its tokens depend on the size of an image in ways of its own (separators between tiles), so it is run once for
    each size, on a blank image.

    Attributes:
        folder: of the checkpoint.
    """

    folder: Path
    position_rows: int = field(default=1, init=False)

    @property
    def videos(self) -> None:
        """Videos are not supported."""
        return None

    @cached_property
    def placeholder_id(self) -> int:
        """The token that stands for an image in a rendered row, before it is replaced."""
        return self._id(self._placeholder)

    @cached_property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that no text of a row has, and that are never sampled."""
        names = {value for value in vars(self._processor).values() if isinstance(value, str)}
        special = set(self._tokenizer.get_added_vocab())
        ids = {self._id(name) for name in names & special}
        return tuple(sorted(ids | find_reserved_ids(self._config) | {self.placeholder_id}))

    @property
    def settings(self) -> dict[str, Any]:
        """All that the tokens and pixels of an image depend on, as JSON values."""
        images = self._processor.image_processor.to_dict()
        return {"image_processor": images, "processor": self._options, "placeholder_id": self.placeholder_id}

    def tokens(self, image: Image) -> list[int]:
        """Return the ids that replace the image's placeholder."""
        return list(self._expand(image).tokens)

    def num_patches(self, image: Image) -> int:
        """Return the number of patches that the vision tower computes, over all tiles."""
        return self._expand(image).num_patches

    def positions(self, input_ids: np.ndarray, images: Sequence[Image]) -> np.ndarray:
        """Return the positions of a whole sequence without padding, int64 [1, L]."""
        return np.arange(len(input_ids), dtype=np.int64)[None]

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Decode images and return `pixel_values`, the tiles of all images, in fp32.

        Raises:
            UserError: an image cannot be read, or is not the one that was tokenized.
        """
        if not images:
            return {}
        return self._run([load_image(image) for image in images])[1]

    def _expand(self, image: Image) -> _Expansion:
        height, width = image.height, image.width
        key: Any = (height, width)
        if hasattr(self._processor, "_get_num_multimodal_tokens"):  # then the number of tokens says which they are
            key = self._processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
        if key not in self._expansions:
            tokens, pixels = self._run([PIL.Image.new("RGB", (width, height))])
            self._expansions[key] = _Expansion(tokens, self._count_patches(pixels["pixel_values"]))
        return self._expansions[key]

    def _count_patches(self, tiles: Tensor) -> int:
        patch = self._config.vision_config.patch_size
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return len(tiles) * (tiles.shape[-2] // height) * (tiles.shape[-1] // width)

    def _run(self, images: list[PIL.Image.Image]) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids and the pixels that the processor makes of images, one after the other."""
        text = self._placeholder * len(images)
        found = self._processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        tokens = found["input_ids"][0].tolist()
        return tokens, {"pixel_values": found["pixel_values"].float()}  # Llama 4's are bfloat16, which NumPy lacks

    def _id(self, token: str) -> int:
        return self._tokenizer.get_vocab()[token]

    @cached_property
    def _expansions(self) -> dict[Any, _Expansion]:
        return {}

    @property
    def _placeholder(self) -> str:
        processor = self._processor
        return getattr(processor, "fake_image_token", processor.image_token)  # Llama 4 has two of them

    @cached_property
    def _processor(self) -> Any:
        name = PROCESSOR_MAPPING_NAMES.get(self._config.model_type)
        if name is None:
            raise UserError(
                f"{self.folder}: model_type = {self._config.model_type}: transformers has no processor of it"
            )
        processor_class = _without_video(getattr(transformers, name))
        return processor_class(
            image_processor=open_image_processor(self.folder), tokenizer=self._tokenizer, **self._options
        )

    @cached_property
    def _options(self) -> dict[str, Any]:
        """The processor's own arguments."""
        file = self.folder / "processor_config.json"
        keys = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {
            key: value
            for key, value in keys.items()
            if key not in ("processor_class", "auto_map") and not isinstance(value, dict)
        }

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def _config(self) -> PretrainedConfig:
        return read_config(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what is cached."""
        return {"folder": self.folder, "position_rows": self.position_rows}


def _without_video(processor_class: Any) -> Any:
    """Return a processor's class that can be built without a video processor, which needs torchvision."""

    class WithoutVideo(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return WithoutVideo
