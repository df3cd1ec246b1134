"""The messages of a conversation: their keys, their roles, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron_gkd.data.bad_row import BadRow, require
from megatron_gkd.data.forms.written import read_written

UNKNOWN_ROLE = "unknown role"  # why a row is bad

_TOOL_CALL = "tool_call"
ROLES = ("system", "developer", "user", "assistant", "tool", _TOOL_CALL)
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": _TOOL_CALL,
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
}


@dataclass(frozen=True)
class Message:
    """A checked message.

    Attributes:
        value: `role`, `content` and the further keys that it was written with.
        place: of its content in the row, for messages: `messages[0].content`.
    """

    value: dict[str, Any]
    place: str


def read_messages(messages: Any, name: str, template_roles: Set[str] = frozenset()) -> list[Message]:
    """Return the messages of a conversation.

    Args:
        messages: a list, or one as JSON text. Each has `role` and `content`, or `from` and `value`, or is a pair of a
            user's and an assistant's text (`{"human": ..., "assistant": ...}`).
        name: the row's key, for messages.
        template_roles: further roles, which the chat template knows.

    Raises:
        BadRow: "wrong type" or "unknown role".
    """
    found: list[Message] = []
    for index, one in enumerate(require(read_written(messages, name), list, name)):
        for message in _read(one, f"{name}[{index}]", template_roles):
            if message.value["role"] == _TOOL_CALL:
                _add_call(found, message)
            else:
                found.append(message)
    return found


def _read(message: Any, place: str, template_roles: Set[str]) -> Iterator[Message]:
    require(message, dict, place)
    message = {key: value for key, value in message.items() if value is not None}
    if not message.keys() & {"role", "content", "from", "value", "tool_calls"}:
        pair = [key for role in ("user", "assistant") for key in message if ALIASES.get(key, key) == role]
        if pair:
            for key in pair:
                role = ALIASES.get(key, key)
                yield Message({"role": role, "content": require(message[key], str, f"{place}.{key}")}, f"{place}.{key}")
            return
    role_key, content_key = (
        other if other in message and key not in message else key
        for key, other in (("role", "from"), ("content", "value"))
    )
    role = _role(require(message.get(role_key), str, f"{place}.{role_key}"), f"{place}.{role_key}", template_roles)
    content = message.get(content_key)
    if "tool_calls" in message:
        require(message["tool_calls"], list, f"{place}.tool_calls")
        content = "" if content is None else content
    if role != _TOOL_CALL:
        require(content, (str, list), f"{place}.{content_key}")
    rest = {key: value for key, value in message.items() if key not in (role_key, content_key)}
    yield Message({"role": role, "content": content, **rest}, f"{place}.{content_key}")


def _role(role: str, place: str, template_roles: Set[str]) -> str:
    """Return the role that the chat template knows."""
    standard = ALIASES.get(role.replace("-", "_"), role)
    if standard != role and role in template_roles and standard not in template_roles:
        return role  # a template with such a role of its own
    if standard in ROLES or standard in template_roles:
        return standard
    near = get_close_matches(role, [*ROLES, *ALIASES], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise BadRow(
        UNKNOWN_ROLE,
        f"{place} = {role!r}: must be {', '.join(ROLES[:-1])}, one of {', '.join(ALIASES)}, {_TOOL_CALL}, or one that "
        f"the chat template names{hint}",
    )


def _add_call(found: list[Message], message: Message) -> None:
    """Add the calls of a `tool_call` message to the assistant's message before it, or as one of its own."""
    calls = read_written(message.value["content"], message.place)
    rest = {key: value for key, value in message.value.items() if key not in ("role", "content")}
    calls = [_call(call, message.place) for call in (calls if isinstance(calls, list) else [calls])]
    if found and found[-1].value["role"] == "assistant":
        last = found[-1].value
        found[-1] = Message({**rest, **last, "tool_calls": [*last.get("tool_calls", []), *calls]}, found[-1].place)
    else:
        found.append(Message({"role": "assistant", "content": "", **rest, "tool_calls": calls}, message.place))


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a call as chat templates read it: of a function by its name, with its arguments."""
    call = require(call, dict, place)
    function = call.get("function", call)
    name = require(function.get("name") if isinstance(function, dict) else None, str, f"{place}: name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = read_written(arguments, f"{place}: arguments")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
