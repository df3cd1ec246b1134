"""On-policy self-distillation: the student scores its own responses with more information.

The teacher is the student's own network. It reads the same responses after each row's `teacher_prompt`, which may have
what the student's prompt lacks: a worked solution, a hint, a document.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.models.megatron_model import MegatronModel, in_eval_mode
from megatron_gkd.teachers.base import Hidden
from megatron_gkd.teachers.label_states import ScoringOptions, compute_hidden
from megatron_gkd.teachers.model_inputs import ModelInputs
from megatron_gkd.teachers.self_weights import TeacherWeights


class SelfTeacher:
    """Score with the student's modules, without dropout, autograd graph or a second copy of the model.

    Args:
        model: the student's.
        weights: the teacher's, which the modules compute with while they score.
        finish_gather: finishes a parameter gather in progress (``Student.gather_parameters``).
        images: what the model's processor makes of images; None for a text model.
        options: how a step's states are computed; None: the defaults.
    """

    def __init__(
        self,
        model: MegatronModel,
        weights: TeacherWeights,
        finish_gather: Callable[[], None],
        images: ImageProcessing | None = None,
        options: ScoringOptions | None = None,
    ) -> None:
        self.model, self.weights, self._finish_gather, self._options = model, weights, finish_gather, options
        self._inputs = ModelInputs(images, images)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """See ``TeacherSource.resident``; the modules have the teacher's weights inside the context."""
        self._finish_gather()  # it would overwrite the teacher's weights later
        with self.weights.active():
            yield

    def score(self, microbatches: Sequence[Microbatch]) -> list[Hidden | None]:
        """See ``TeacherSource.score``."""
        with in_eval_mode(self.model.chunks):
            return compute_hidden(self.model, microbatches, self.weights.head, self._inputs, self._options)

    def after_update(self) -> None:
        """See ``FollowsStudent.after_update``."""
        self.weights.after_update()


def require_teacher_prompts(dataset: TokenizedDataset, place: str) -> None:
    """Check that a teacher with the student's current weights reads other prompts than the student.

    Args:
        dataset: the training rows.
        place: of the teacher in the recipe.

    Raises:
        UserError: no row has a `teacher_prompt`.
    """
    if not dataset.teacher_lengths.any():
        raise UserError(
            f"{place}.teacher_kind = self: no row of data.dataset has a teacher_prompt, without which teacher and "
            "student are the same and the divergence is 0; add that key, or name student.model in teacher_model, or "
            "set teacher_ema"
        )
