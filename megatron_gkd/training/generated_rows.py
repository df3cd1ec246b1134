"""Responses of a model to rows of the dataset, and the rows of the file that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.prompt import extract_prompt, max_response_length
from megatron_gkd.rollout.base import Completion
from megatron_gkd.training.completion_sampler import CompletionSampler, SampleRequest

_STREAM = 0x67656E  # keeps these draws apart from those of training, which start from the same seed


@dataclass(frozen=True)
class GeneratedResponse:
    """One response to a row of the dataset. `number` counts the responses to one row, from 0."""

    row: int
    number: int
    completion: Completion


class ResponseGenerator:
    """Generate responses to rows of the dataset, on all data-parallel ranks together.

    Args:
        recipe: for the seed and the longest sequences.
        dataset: of the prompts.
        sampler: generates completions.
        num_responses: to each row.
    """

    def __init__(self, recipe: Recipe, dataset: SampleDataset, sampler: CompletionSampler, num_responses: int) -> None:
        self.recipe, self.dataset, self.sampler, self.num_responses = recipe, dataset, sampler, num_responses

    def generate(self, rows: Sequence[int]) -> list[GeneratedResponse]:
        """Return all responses to `rows`, in this order, on every rank. All ranks must call it together.

        Raises:
            UserError: in all ranks; a prompt leaves no room for a response.
        """
        data = self.recipe.data
        places: list[tuple[int, int]] = []
        requests: list[SampleRequest] = []
        for row in rows:
            sample = self.dataset[row]
            max_length = max_response_length(sample, data.max_length, data.teacher_max_length or data.max_length)
            for number in range(self.num_responses):
                places.append((row, number))
                requests.append(SampleRequest.from_sample(sample, self._seed(row, number), max_length))
        completions = self.sampler.generate(requests)
        return [GeneratedResponse(*place, completion) for place, completion in zip(places, completions, strict=True)]

    def _seed(self, row: int, number: int) -> int:
        sequence = np.random.SeedSequence([self.recipe.train.seed, _STREAM, row, number])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class RowFormatter:
    """Make the file's rows of responses. The token ids are what training reads; the texts are for people.

    Args:
        recipe: for the treatment of truncated completions, and the key of tags.
        dataset: of the prompts.
        tokenizer: decodes the texts.
        model: name of the model that generated the responses.
    """

    def __init__(self, recipe: Recipe, dataset: SampleDataset, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self.recipe, self.dataset, self.tokenizer, self.model = recipe, dataset, tokenizer, model

    def format(self, responses: Sequence[GeneratedResponse]) -> list[dict[str, Any]]:
        """Return the rows of `responses`, without truncated ones where these are dropped."""
        is_dropped = self.recipe.rollout.truncated_completions == "drop"
        return [
            self._format(response)
            for response in responses
            if not (is_dropped and response.completion.finish_reason == "length")
        ]

    def _format(self, response: GeneratedResponse) -> dict[str, Any]:
        sample, completion = self.dataset[response.row], response.completion
        prompt = extract_prompt(sample).tolist()
        record = {
            "row": response.row,
            "number": response.number,
            "prompt": self.tokenizer.decode(prompt),
            "response": self.tokenizer.decode(completion.token_ids),
            "prompt_token_ids": prompt,
            "response_token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "model": self.model,
            "version": completion.version,
        }
        if sample.images:
            record["images"] = [image.location for image in sample.images]
        if sample.teacher_prompt is not None:
            record["teacher_prompt_token_ids"] = sample.teacher_prompt.tolist()
            if sample.teacher_images is not None and sample.teacher_images != sample.images:
                record["teacher_images"] = [image.location for image in sample.teacher_images]
        tag_key = self.recipe.teacher.teacher_tag_key
        if tag_key is not None and sample.tag is not None:
            record[tag_key] = sample.tag
        if completion.finish_reason == "length" and self.recipe.rollout.truncated_completions == "mask":
            record["masked"] = True
        return record
