"""The experiment's students: one row of its table each."""

from collections.abc import Sequence
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
        is_own_teacher: with the weights that it starts from.
        has_adapters: it trains adapters alone, and is evaluated with them merged.
    """

    name: str
    recipe: str
    color: str
    start: str | None = None
    has_teacher: bool = True
    data: str = "student_train"
    is_own_teacher: bool = False
    has_adapters: bool = False


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
    Row(
        "self-distillation",
        "further_self",
        "#2a9d8f",
        start="reader",
        has_teacher=False,
        data="self_train",
        is_own_teacher=True,
    ),
)
# Adapters against all parameters: the same student goes on with the same teacher, rows and steps.
LORA = (
    FROM_SCRATCH[0],
    ON_POLICY[1],
    Row("offline GKD, LoRA", "further_lora", "#c44e52", start="cross-entropy", has_adapters=True),
)


def rows_of(*, on_policy: bool, is_own_teacher: bool, lora: bool) -> tuple[Row, ...]:
    """Return the rows of the experiments that are asked for, each once; those from scratch where none is."""
    groups = [(on_policy, FROM_SCRATCH + ON_POLICY), (is_own_teacher, SELF), (lora, LORA)]
    chosen = [row for is_chosen, group in groups if is_chosen for row in group]
    return tuple(dict.fromkeys(chosen)) or FROM_SCRATCH


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return what the results of these rows are called: the experiments that they belong to."""
    marks = {"on_policy": ON_POLICY[0], "self": SELF[0], "lora": LORA[-1]}
    return [name for name, row in marks.items() if row in rows] or ["results"]
