"""Processors of tiny multimodal models, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vision_checkpoints import save_vision_processor, vision_config

from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import open_processing


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of(family)`: a folder with the configuration, the tokenizer and the processor of a family."""

    def folder(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"processor-{family}"
        if not path.exists():
            path.mkdir()
            save_vision_processor(path, family)
            vision_config(family).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def processing(request, folder_of) -> ImageProcessing:
    """A processor that scales images to a grid, and one that divides them into tiles."""
    opened = open_processing(folder_of(request.param))
    assert opened is not None
    return opened
