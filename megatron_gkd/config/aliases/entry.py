"""The entries of the tables of other tools' names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SWIFT, TRL, NEMO = "ms-swift", "TRL", "NeMo-RL"
Values = Mapping[str, Any]
"""Values by the recipe's leaves, or by other tools' names."""


@dataclass(frozen=True)
class Alias:
    """Another tool's name of keys of the recipe.

    Attributes:
        leaves: the keys that it sets; the first one's section is where a recipe may use the name.
        tools: the tools that have the name.
        read: returns the values of the leaves for its value, or raises ValueError with what the name takes; None: the
            value is that of the one leaf.
        group: the names that are read together with it, whose values are one mapping for `read`; "" for none.
        note: a remark for the documentation.
    """

    leaves: tuple[str, ...]
    tools: tuple[str, ...]
    read: Callable[[Any], Values] | None = None
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Held:
    """A setting of another tool that always holds here with some values.

    Attributes:
        tools: the tools that have the name.
        values: the values that hold, of which the name takes no other.
        reason: why they hold.
        otherwise: what to do where another value is wanted; "" for nothing.
    """

    tools: tuple[str, ...]
    values: tuple[Any, ...]
    reason: str
    otherwise: str = ""


@dataclass(frozen=True)
class Unsupported:
    """A setting of another tool without a counterpart.

    Attributes:
        tools: the tools that have the name.
        reason: why there is none, and what to use instead.
    """

    tools: tuple[str, ...]
    reason: str
