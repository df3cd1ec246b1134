"""On-policy self-distillation: the student judges itself, knowing more.

The teacher is the student's own network, reading the same responses behind each row's `teacher_prompt`, which may hold
what the student is not told: a worked solution, a hint, a document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import UserError
from megatron_gkd.models.megatron_model import MegatronModel, in_eval_mode
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.teachers.reading import states_at_labels
from megatron_gkd.teachers.self_weights import WeightsOf


class SelfTeacher:
    """`model`: the student's, whose modules score without dropout, autograd graph or a second copy.

    `weights`: what they compute with meanwhile. An adapter that is switched off is one more kind of it.
    `complete`: finishes a parameter gather that is under way (``Student.gather_parameters``).
    """

    def __init__(self, model: MegatronModel, weights: WeightsOf, complete: Callable[[], None]):
        self.model, self.weights, self._complete = model, weights, complete

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        self._complete()  # else it would overwrite the weights that are put in the student's place
        with self.weights.active():
            yield

    def score(self, microbatches: Sequence[Microbatch]) -> list[Hidden | None]:
        with in_eval_mode(self.model.chunks):
            collected = states_at_labels(self.model.chunks, microbatches, self.model.mesh)
        return [None if states is None else Hidden(states, self.weights.head_weight) for states in collected]

    def after_update(self) -> None:
        self.weights.after_update()


def require_teacher_prompts(dataset: TokenizedDataset, place: str) -> None:
    """UserError where a student with its current weights would be its own teacher and never know more than itself.

    `place`: of the teacher in the recipe.
    """
    if not dataset.teacher_lengths.any():
        raise UserError(
            f"{place}.teacher_kind = self: no row of data.dataset has a teacher_prompt, without which teacher and "
            "student are the same and the divergence is 0; add that key, or name student.model in teacher_model, or "
            "set teacher_ema"
        )
