"""The experiment's students: one row of its table each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """How a student is trained.

    Attributes:
        name: in tables and pictures.
        recipe: its file in recipes/, and the beginning of its folder's name.
        color: in pictures.
        start: the row whose student, of the same seed, it goes on from; None: random weights.
        has_teacher: it learns from the teacher.
        data: its training file in data/.
    """

    name: str
    recipe: str
    color: str
    start: str | None = None
    has_teacher: bool = True
    data: str = "student_train"


FROM_SCRATCH = (
    Row("cross-entropy", "student_ce", "#d1701f", has_teacher=False),
    Row("GKD", "student_gkd", "#4878a8"),
)
# A student with random weights answers nothing that a teacher could judge. These go on from the one that cross-entropy
# has trained, all for the same number of steps.
ON_POLICY = (
    Row("cross-entropy, continued", "further_ce", "#e9b384", start="cross-entropy", has_teacher=False),
    Row("offline GKD", "further_offline", "#9cc3e6", start="cross-entropy"),
    Row("mixed", "further_mixed", "#6aa86a", start="cross-entropy"),
    Row("on-policy", "further_on_policy", "#8e5ea2", start="cross-entropy"),
)
# Self-distillation wants a student that can read what it is told. This one has seen each of its problems with the
# calculations in the question as well. It goes on with other problems, of which only the teacher, itself, sees those.
SELF = (
    Row("reader", "student_reader", "#b08d57", has_teacher=False, data="reader_train"),
    Row("reader, continued", "further_reader", "#d8c3a5", start="reader", has_teacher=False, data="reader_train"),
    Row("self-distillation", "further_self", "#2a9d8f", start="reader", has_teacher=False, data="self_train"),
)
