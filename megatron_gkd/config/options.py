"""Options of commands beside the recipe's keys: `--output FOLDER`, `-n 4`."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gkd.config.errors import RecipeError


@dataclass(frozen=True)
class Option:
    """`--name value`, or `--name` alone for a flag, which is true where it is given.

    Attributes:
        allowed: what the option takes, in words.
        meaning: its line in --help.
        default: the value where it is not given.
        read: makes the value of the text, or raises ValueError.
        bare: the value where the option stands alone, with nothing or another option behind it; None: it never does.
    """

    allowed: str
    meaning: str
    default: Any = None
    read: Callable[[str], Any] = str
    required: bool = False
    is_flag: bool = False
    bare: Any = None

    def parse(self, text: str, *, is_bare: bool) -> Any:
        """Return the value of the text after the option; `is_bare` where `=` and text are missing.

        Raises:
            ValueError: the option does not take it.
        """
        if self.is_flag:
            if not is_bare:
                raise ValueError
            return True
        if is_bare and text == "" and self.bare is not None:
            return self.bare
        if text == "" or text.startswith("--"):
            raise ValueError
        return self.read(text)


def positive(text: str) -> int:
    """Return an integer from 1.

    Raises:
        ValueError: the text is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text: str) -> int:
    """Return an integer from 0.

    Raises:
        ValueError: the text is none.
    """
    if not text.isdecimal():
        raise ValueError
    return int(text)


def share(text: str) -> float:
    """Return a number above 0, at most 1.

    Raises:
        ValueError: the text is none.
    """
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def at_least_one(text: str) -> float:
    """Return a finite number from 1.

    Raises:
        ValueError: the text is none.
    """
    value = float(text)
    if not 1 <= value < float("inf"):
        raise ValueError
    return value


def take_options(arguments: Sequence[str], options: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a command's own `options`, and the other arguments.

    Raises:
        RecipeError: with all that is wrong with them.
    """
    found: dict[str, Any] = {}
    rest, problems = [], []
    remaining = deque(arguments)
    while remaining:
        argument = remaining.popleft()
        name, equals, text = _split(argument, options)
        if name is None:
            rest.append(argument)
            continue
        option = options[name]
        if not equals and _takes_next(option, remaining):
            text = remaining.popleft()
        try:
            found[name] = option.parse(text, is_bare=not equals)
        except ValueError:
            allowed = f"must be {option.allowed}" if option.allowed else "takes no value"
            problems.append(f"--{name} = {text}: {allowed}")
            found[name] = None
    problems += _missing(found, options)
    if problems:
        raise RecipeError(problems)
    return {name: found.get(name, option.default) for name, option in options.items()}, rest


def _takes_next(option: Option, remaining: Sequence[str]) -> bool:
    """Return whether the next argument is the option's value."""
    if option.is_flag or not remaining:
        return False
    return option.bare is None or not remaining[0].startswith("--")


def _split(argument: str, options: Mapping[str, Option]) -> tuple[str | None, bool, str]:
    """Return the option's name, None if it is none of `options`; whether it has an `=`; and the text after that."""
    flag, equals, text = argument.partition("=")
    if not flag.startswith("-"):
        return None, False, ""
    name = flag.removeprefix("-" if len(flag) == 2 else "--")  # -n as well: torchrun takes --n for its own
    for known in (name, name.replace("_", "-")):  # as torchrun, which takes --max_restarts for --max-restarts
        if known in options:
            return known, bool(equals), text
    return None, False, ""


def _missing(found: Mapping[str, Any], options: Mapping[str, Option]) -> Iterator[str]:
    for name, option in options.items():
        if option.required and name not in found:
            yield f"--{name}: missing; must be {option.allowed} ({option.meaning})"


def help_of(options: Mapping[str, Option]) -> str:
    """Return two lines for each option, in the form of those of the recipe's keys."""
    lines = []
    for name, option in options.items():
        default = "optional" if option.default is None else f"default: {option.default}"
        default = "required" if option.required else "flag" if option.is_flag else default
        lines += [f"  --{name}  {option.allowed}  [{default}]", f"        {option.meaning}"]
    return "\n".join(lines)
