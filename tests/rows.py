"""Random rows with known lengths, as the training loop's data set."""

from __future__ import annotations

import numpy as np

from megatron_gkd.data.sample import Sample

WEIGHTS = [0.0, 0.25, 1.0, 3.0]


class RandomRows:
    """`count` rows of 5 to `longest` tokens below `vocab_size`.

    The first third of each is a prompt without labels.

    Rows have the tags a and b in turn. Of `privileged` ones, two of three have a prompt of their own for the teacher.
    `most_labels` leaves only so many at the end of each row. Of `weighted` ones, two of three have weights of labels,
    and lack the labels whose weight is 0.
    """

    def __init__(
        self,
        count: int = 8,
        longest: int = 24,
        vocab_size: int = 64,
        seed: int = 0,
        *,
        privileged: bool = False,
        most_labels: int | None = None,
        weighted: bool = False,
    ):
        generator = np.random.default_rng(seed)
        self.lengths = generator.integers(5, longest + 1, count)
        self.rows = [generator.integers(4, vocab_size, length).astype(np.int64) for length in self.lengths]
        self.prompt_lengths = self.lengths // 3
        if most_labels is not None:
            self.prompt_lengths = np.maximum(self.prompt_lengths, self.lengths - 1 - most_labels)
        self.num_labels = self.lengths - 1 - self.prompt_lengths
        self.sizes = [count]
        self.teacher_prompts: list[np.ndarray | None] = [None] * count
        if privileged:
            lengths = [0 if index % 3 == 1 else generator.integers(1, longest + 1) for index in range(count)]
            self.teacher_prompts = [generator.integers(4, vocab_size, n) if n else None for n in lengths]
        self.label_weights: list[np.ndarray | None] = [None] * count
        if weighted:
            drawn = [generator.choice(WEIGHTS, length).astype(np.float32) for length in self.lengths]
            self.label_weights = [None if index % 3 == 2 else weights for index, weights in enumerate(drawn)]
            self.num_labels = np.array([self[index].num_labels for index in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        tokens = self.rows[index]
        labels = np.append(tokens[1:], -100)
        labels[: self.prompt_lengths[index]] = -100
        weights = self.label_weights[index]
        if weights is not None:
            labels[weights == 0] = -100
        return Sample(
            input_ids=tokens,
            labels=labels,
            source="dataset",
            row_id=index,
            teacher_prompt=self.teacher_prompts[index],
            tag="ab"[index % 2],
            label_weights=weights,
            response_start=None if weights is None else int(self.prompt_lengths[index]) + 1,
        )
