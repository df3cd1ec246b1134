"""Further fields of Megatron-Core's configuration, which a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gkd.config.megatron_fields import describe_problems
from megatron_gkd.errors import UserError

_KEY = "megatron.megatron_extra_kwargs"


def require_extra_fields(extra: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check the entries of `megatron_extra_kwargs` before a configuration is built with them.

    Args:
        extra: the entries.
        settings: the fields that are set already.

    Raises:
        UserError: a field does not exist, has another type, or is decided elsewhere.
    """
    for problem in describe_problems(extra):
        raise UserError(f"{_KEY}: {problem}")
    for name in extra:
        if name in settings:
            raise UserError(f"{_KEY}: {name} is decided by the student's checkpoint; leave it out")
