"""The experiments and the students of each: one row of a results table each."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """How a student is trained.

    Attributes:
        name: the student's name in tables and pictures.
        recipe: the name of its file in recipes/, and the start of its folder's name.
        color: its color in pictures.
        start: the row whose student, of the same seed, it continues; None: random weights.
        has_teacher: whether it learns from the teacher.
        data: the name of its training file in data/.
        is_own_teacher: whether it learns from its own initial weights.
        has_adapters: whether it trains adapters alone; they are merged for the evaluation.
    """

    name: str
    recipe: str
    color: str
    start: str | None = None
    has_teacher: bool = True
    data: str = "student_train"
    is_own_teacher: bool = False
    has_adapters: bool = False


# The quickstart: short runs that end within minutes.
QUICK = (
    Row("cross-entropy", "quick_ce", "#d1701f", has_teacher=False),
    Row("GKD", "quick_gkd", "#4878a8"),
)
QUICK_TEACHER = "quick_teacher"

# The experiment of docs/results.md. Its settings stay as they are, since its results are published.
EXPERIMENT_TEACHER = "teacher"
FROM_SCRATCH = (
    Row("cross-entropy", "student_ce", "#d1701f", has_teacher=False),
    Row("GKD", "student_gkd", "#4878a8"),
)
# A student with random weights samples nothing that a teacher could correct. These continue the student trained with
# cross-entropy, all for the same number of steps.
ON_POLICY = (
    Row("cross-entropy, continued", "further_ce", "#e9b384", start="cross-entropy", has_teacher=False),
    Row("offline GKD", "further_offline", "#9cc3e6", start="cross-entropy"),
    Row("mixed", "further_mixed", "#6aa86a", start="cross-entropy"),
    Row("on-policy", "further_on_policy", "#8e5ea2", start="cross-entropy"),
)
# Self-distillation needs a student that can use a hint in the question. This one has seen each of its problems with the
# calculations in the question as well. It continues with other problems, whose hints only the teacher, itself, reads.
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
# Adapters against all parameters: the same student continues with the same teacher, rows and steps.
LORA = (
    FROM_SCRATCH[0],
    ON_POLICY[1],
    Row("offline GKD, LoRA", "further_lora", "#c44e52", start="cross-entropy", has_adapters=True),
)
# A multimodal student that reads drawn digits.
IMAGES_TEACHER = "images_teacher"
IMAGES = (
    Row("cross-entropy", "images_ce", "#d1701f", has_teacher=False),
    Row("GKD", "images_gkd", "#4878a8"),
)


def select_rows(*, on_policy: bool, is_own_teacher: bool, lora: bool) -> tuple[Row, ...]:
    """Return the rows of the chosen parts of the experiment, each once; those from scratch if none is chosen."""
    groups = [(on_policy, FROM_SCRATCH + ON_POLICY), (is_own_teacher, SELF), (lora, LORA)]
    chosen = [row for is_chosen, group in groups if is_chosen for row in group]
    return tuple(dict.fromkeys(chosen)) or FROM_SCRATCH


def result_names(rows: Sequence[Row]) -> list[str]:
    """Return the names of the results of these rows: the parts of the experiment that they belong to."""
    marks = {"quick": QUICK[0], "on_policy": ON_POLICY[0], "self": SELF[0], "lora": LORA[-1], "images": IMAGES[0]}
    return [name for name, row in marks.items() if row in rows] or ["results"]
