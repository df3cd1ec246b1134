"""What is wrong with a recipe, all of it at once."""

from collections.abc import Sequence

from megatron_gkd.errors import UserError


class RecipeError(UserError):
    """A recipe that can't be run. `problems` holds one line a problem: the key, its value, what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
