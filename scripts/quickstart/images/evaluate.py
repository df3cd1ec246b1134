"""Evaluate an exported multimodal checkpoint with transformers alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

# transformers' own name for it, `transformers.AutoImageProcessor`, wants torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from quickstart.evaluate import Scores, compare, count_right, generate, label_responses, pad_prompts
from quickstart.images.digits import Reading
from quickstart.tokenizer import IMAGE


def evaluate(checkpoint: Path, teacher: Path, readings: Sequence[Reading], batch_size: int = 100) -> Scores:
    """Return the scores of a Hugging Face directory; both models compute in fp32 on the CPU."""
    model, teacher_model = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32) for path in (checkpoint, teacher)
    )
    encoder = Encoder(checkpoint)
    groups = [readings[begin : begin + batch_size] for begin in range(0, len(readings), batch_size)]
    solutions = [text for group in groups for text in generate(model, encoder.tokenizer, encoder.encode_prompts(group))]
    accuracy = count_right(solutions, [reading.answer for reading in readings]) / len(readings)
    return Scores(accuracy, *compare(model, teacher_model, map(encoder.encode_rows, groups)))


class Encoder:
    """Makes a model's arguments of readings, with the tokenizer and the image processor of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._images: Any = AutoImageProcessor.from_pretrained(checkpoint)

    def encode_prompts(self, readings: Sequence[Reading]) -> dict[str, Tensor]:
        """Return the arguments of `generate`, padded on the left."""
        images = self._encode_images(readings)
        return self._with_images(images, **pad_prompts(self.tokenizer, list(self._prompts(readings, images))))

    def encode_rows(self, readings: Sequence[Reading]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the model's arguments and labels of questions with their solutions, padded on the right."""
        images = self._encode_images(readings)
        prompts = list(self._prompts(readings, images))
        input_ids, labels = label_responses(self.tokenizer, prompts, [reading.solution for reading in readings])
        return self._with_images(images, input_ids=input_ids), labels

    def _encode_images(self, readings: Sequence[Reading]) -> dict[str, Tensor]:
        pictures: list[Image.Image] = [reading.draw().convert("RGB") for reading in readings]
        return dict(self._images(images=pictures, return_tensors="pt"))

    def _prompts(self, readings: Sequence[Reading], images: dict[str, Tensor]) -> Iterator[str]:
        """Return prompts with as many placeholders as the model computes features of each image."""
        counts = (images["image_grid_thw"].prod(-1) // self._images.merge_size**2).tolist()
        for reading, count in zip(readings, counts, strict=True):
            question = reading.messages("")[:1]
            prompt = self.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
            yield prompt.replace(IMAGE, IMAGE * count)

    def _with_images(self, images: dict[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        is_image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)
        return {**inputs, **images, "mm_token_type_ids": is_image.int()}
