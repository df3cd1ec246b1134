"""The strategies of `data.loss_scale`: which tokens of a row are trained on. The names are those of ms-swift."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

LossTurns = Literal["last_round", "default", "all"]
"""The assistant turns after the last user message; all assistant turns; all tokens, those of prompts too."""

LossScaleName = Literal[
    "last_round",
    "default",
    "all",
    "last_round+ignore_empty_think",
    "default+ignore_empty_think",
    "all+ignore_empty_think",
]
_IGNORE_EMPTY_THINK = "ignore_empty_think"
_BARE = "default"  # as in ms-swift, what a strategy is combined with that names no turns


def _normalize(value: Any) -> Any:
    """Return ms-swift's other spellings as `LossScaleName` has them: `last_round_with_ignore_empty_think`."""
    if not isinstance(value, str):
        return value
    name = value.strip().replace("_with_", "+").replace(" ", "")
    return f"{_BARE}+{name}" if name == _IGNORE_EMPTY_THINK else name


LossScale = Annotated[LossScaleName, BeforeValidator(_normalize)]


def turns_of(name: LossScaleName) -> LossTurns:
    """Return the turns that a strategy trains on."""
    turns: Any = name.partition("+")[0]
    return turns


def ignores_empty_think(name: LossScaleName) -> bool:
    """Return whether an empty block of thoughts gets no loss."""
    return name.endswith(_IGNORE_EMPTY_THINK)
