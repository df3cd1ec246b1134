"""The error of a wrong recipe, with all of its problems."""

from collections.abc import Sequence

from megatron_gkd.errors import UserError, one_line


class RecipeError(UserError):
    """A recipe can't be run.

    Attributes:
        problems: one line for each problem: the key, its value, what is wrong or allowed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(map(one_line, problems))
        super().__init__("\n".join(self.problems))
