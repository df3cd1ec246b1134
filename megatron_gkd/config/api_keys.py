"""The API keys of servers: a recipe names the environment variables that hold them, and nothing shows their content."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from megatron_gkd.errors import UserError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")  # other text may be a key, which was written in place of a name
_KEY = re.compile(r"[!-~]+")


def describe_variable(variable: str) -> str:
    """Return the name of a variable for a message, or a note where it may be a key itself."""
    return variable if _SHOWN.fullmatch(variable) else "(not shown)"


def name_problem(place: str, variable: str) -> str | None:
    """Return why `variable`, the value of the recipe's key `place`, is no name of a variable; None where it is one."""
    if _NAME.fullmatch(variable):
        return None
    shown = describe_variable(variable)
    return f"{place} = {shown}: must be the name of an environment variable; the API key itself is never in a recipe"


def variable_problem(place: str, variable: str) -> str | None:
    """Return why the variable that the recipe's key `place` names holds no API key here; None where it does."""
    shown = f"{place} = {describe_variable(variable)}"
    content = os.environ.get(variable, "").strip()
    if not content:
        state = "empty" if variable in os.environ else "not set"
        return f"{shown}: this environment variable is {state}; export the servers' API key in it, on every node"
    if not _KEY.fullmatch(content):
        return f"{shown}: this environment variable must hold an API key: letters, digits and signs without spaces"
    return None


@dataclass(frozen=True)
class ApiKeyVariable:
    """The variable with the API key of some servers.

    Attributes:
        place: the recipe's key that names it.
        name: its name; None for servers that need no API key.
    """

    place: str
    name: str | None = None

    def read(self) -> str | None:
        """Return the API key; None where the recipe names no variable.

        Raises:
            UserError: the variable is not set, or holds no key.
        """
        if self.name is None:
            return None
        problem = name_problem(self.place, self.name) or variable_problem(self.place, self.name)
        if problem is not None:
            raise UserError(problem)
        return os.environ[self.name].strip()


NO_API_KEY = ApiKeyVariable("")
"""Of servers that need none."""
