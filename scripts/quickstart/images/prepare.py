"""Write what the experiment with images starts from: pictures, rows, and untrained multimodal models."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from quickstart.images.digits import Reading, make_readings

SEED = 2025
TEACHER_ROWS, STUDENT_ROWS, VALIDATION_ROWS, TEST_ROWS = 8000, 1000, 200, 400
SLIPS = 0.2  # share of misread digits in the student's file

PATCH, MERGE = 8, 2
TEACHER = {
    "text_config": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4},
    "vision_config": {"depth": 2, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3},
}
STUDENT = {
    "text_config": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2},
}
HEAD_DIM, ROTARY_SECTIONS = 32, [8, 4, 4]
TEXT_INIT, VISION_INIT = 0.04, 0.1
# Most pixels are dark: they are near zero with these, and a digit's are large.
MEAN, DEVIATION = 0.1, 0.25


def make_splits(seed: int = SEED) -> dict[str, list[Reading]]:
    """Return the readings of each split. Only the student's file has misread digits."""
    clean = make_readings(seed)
    return {
        "test": list(islice(clean, TEST_ROWS)),
        "validation": list(islice(clean, VALIDATION_ROWS)),
        "teacher_train": list(islice(clean, TEACHER_ROWS)),
        "student_train": list(islice(make_readings(seed + 1, SLIPS), STUDENT_ROWS)),
    }


def write_data(directory: Path) -> None:
    """Write a file of rows for each split, and beside it a folder of its pictures."""
    for name, readings in make_splits().items():
        write_readings(directory, name, readings)


def write_readings(directory: Path, name: str, readings: Iterable[Reading]) -> None:
    """Write `name`.jsonl, one chat row per line, and the pictures that its rows refer to into the folder `name`."""
    (directory / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, reading in enumerate(readings):
        picture = f"{name}/{index:05}.png"
        reading.draw().save(directory / picture)
        drawn = {"digits": reading.digits, "seed": reading.seed, "answer": reading.answer}
        row = {"messages": reading.messages(picture), **drawn}
        lines.append(json.dumps(row) + "\n")
    (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_readings(path: Path) -> Iterator[Reading]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        user, assistant = row["messages"]
        question = user["content"][-1]["text"]
        yield Reading(tuple(row["digits"]), row["seed"], question, assistant["content"], row["answer"])


def write_tokenizer(directory: Path, training_file: Path) -> None:
    """Write a tokenizer of the readings' words, in which each digit is a token."""
    from quickstart.tokenizer import train_tokenizer

    texts = (f"{reading.question} {reading.solution}" for reading in read_readings(training_file))
    train_tokenizer(texts, vocab_size=384, digits=1, has_images=True).save_pretrained(directory)


def write_untrained(directory: Path, tokenizer_directory: Path, shape: dict[str, dict[str, int]], seed: int) -> None:
    """Write a Qwen3-VL model with random weights and tied embeddings, in fp32, its tokenizer and image processor."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    text_config = {
        **shape["text_config"],
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": ROTARY_SECTIONS,
            "mrope_interleaved": True,
        },
        "initializer_range": TEXT_INIT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = {
        **shape["vision_config"],
        "out_hidden_size": shape["text_config"]["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": VISION_INIT,
    }
    config = Qwen3VLConfig(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True, **_special_ids(tokenizer)
    )
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write_processor(directory)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    from quickstart.tokenizer import IMAGE, VIDEO, VISION_END, VISION_START

    tokens = {"image": IMAGE, "video": VIDEO, "vision_start": VISION_START, "vision_end": VISION_END}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _write_processor(directory: Path) -> None:
    # This form of it needs no torchvision.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=MERGE,
        size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 64 * 64},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    ).save_pretrained(directory)
    processor = {"processor_class": "Qwen3VLProcessor"}
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
