"""The base class of the recipe's sections, and the types that their keys share."""

import os
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from megatron_gkd.config.durations import parse_duration

_LONGEST_NAME = 255  # bytes of a file's name, the most that file systems allow


def _as_path(text: str) -> str:
    """Return a path with the user's home in place of `~`."""
    if "\0" in text or any(len(name.encode(errors="replace")) > _LONGEST_NAME for name in text.split("/")):
        raise PydanticCustomError("path", f"a path without NUL, and with names of at most {_LONGEST_NAME} bytes")
    return os.path.expanduser(text)


PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(_as_path)]


def _root_of_server(url: str) -> str:
    """Return the address below which a server has `/v1` and its other routes.

    Raises:
        ValueError: the port is no number in [1, 65535].
    """
    if urlsplit(url).port == 0:
        raise ValueError("port 0")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


ServerUrl = Annotated[
    str, StringConstraints(pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$"), AfterValidator(_root_of_server)
]
TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, StringConstraints(min_length=1)]
ModuleName = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


def _parse_seconds(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(_parse_seconds)]


def as_sequence(value: Any) -> Any:
    """Return a list of one entry for an entry that has no brackets: `dataset: train.jsonl`."""
    return [value] if isinstance(value, str | dict | int) else value


class Section(BaseModel):
    """A frozen section without unknown keys. Text that reads as a number is one (`1e-4`); true and false never are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not a value of this key")
        return value
