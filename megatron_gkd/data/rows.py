"""Check of a row as it was written, and its three forms: a conversation, a text and its continuation, token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

_ONLY_ALONE = "only distill.lmbda = 1 takes prompts alone"


class BadRow(Exception):
    """A row that cannot be trained on.

    Args:
        reason: what such rows are counted by.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    The last one is an assistant turn; later messages are removed. A prompt alone has no such turn.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_prompt: str | None = None

    def for_teacher(self) -> Conversation:
        """Return the row with `teacher_prompt` as the content of the last user message.

        Raises:
            BadRow: "no user message".
        """
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise BadRow("no user message", "teacher_prompt replaces the last user message, and there is none")
        messages = list(self.messages)
        messages[users[-1]] = {**messages[users[-1]], "content": self.teacher_prompt}
        return replace(self, messages=messages, teacher_prompt=None)


@dataclass(frozen=True)
class PlainText:
    """Plain text and its continuation (None where a prompt alone is a row), without a chat template."""

    prompt: str
    response: str | None
    teacher_prompt: str | None = None

    def for_teacher(self) -> PlainText:
        """Return the row with `teacher_prompt` as the prompt."""
        return PlainText(self.prompt if self.teacher_prompt is None else self.teacher_prompt, self.response)


@dataclass(frozen=True)
class TokenIds:
    """A prompt and its response as ids of the student's tokenizer.

    Attributes:
        prompt: ids of the prompt.
        response: ids of the response; None where a prompt alone is a row.
        teacher_prompt: ids that the teacher reads in place of the prompt.
        masked: the row is not to be trained on.
    """

    prompt: list[int]
    response: list[int] | None
    teacher_prompt: list[int] | None = None
    masked: bool = False

    def for_teacher(self) -> TokenIds:
        """Return the row with `teacher_prompt` as the prompt."""
        return TokenIds(self.prompt if self.teacher_prompt is None else self.teacher_prompt, self.response)


Row = Conversation | PlainText | TokenIds


def parse_row(row: Any, *, allows_prompts: bool = False) -> Row:
    """Check a row and return it in one of its forms. Keys whose value is null count as absent.

    Args:
        row: as it was written.
        allows_prompts: a row may be a prompt alone: messages without an assistant turn, or no response.

    Raises:
        BadRow: with reason "wrong type", "no messages", "no assistant turn", "empty response" or "empty
            teacher_prompt".
    """
    _require(row, dict, "the row")
    row = {key: value for key, value in row.items() if value is not None}
    if "prompt_token_ids" in row:  # before the text that may stand beside them for people
        return _token_ids(row, allows_prompts)
    if "messages" in row:
        return _conversation(row, _messages(row["messages"], "messages"), allows_prompts)
    if "prompt" not in row:
        keys = ", ".join(sorted(map(str, row))) or "nothing"
        raise BadRow("no messages", f"a row needs `messages`, or `prompt` and `response`; this one has {keys}")
    prompt = _require(row["prompt"], (str, list), "prompt")
    if "response" not in row:
        if not allows_prompts:
            raise BadRow("no assistant turn", f"the row has a prompt but no response; {_ONLY_ALONE}")
        if isinstance(prompt, str):
            return PlainText(prompt, None, _teacher_prompt(row))
        return _build_conversation(row, _messages(prompt, "prompt"))
    response = _require(row["response"], str, "response")
    if not response.strip():
        raise BadRow("empty response", "response is empty")
    if isinstance(prompt, str):
        return PlainText(prompt, response, _teacher_prompt(row))
    return _conversation(
        row, [*_messages(prompt, "prompt"), {"role": "assistant", "content": response}], allows_prompts
    )


def _conversation(row: dict[str, Any], messages: list[dict[str, Any]], allows_prompts: bool) -> Conversation:
    assistant_turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if allows_prompts and messages and not assistant_turns:
        return _build_conversation(row, messages)
    if not assistant_turns:
        roles = ", ".join(message["role"] for message in messages) or "no message at all"
        raise BadRow("no assistant turn", f"the roles are: {roles}; {_ONLY_ALONE}")
    last = assistant_turns[-1]
    if not (messages[last]["content"].strip() or messages[last].get("tool_calls")):
        raise BadRow("empty response", f"messages[{last}] (assistant) has neither content nor tool_calls")
    return _build_conversation(row, messages[: last + 1])


def _build_conversation(row: dict[str, Any], messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(messages, _tools(row.get("tools")), _template_kwargs(row), _teacher_prompt(row))


def read_tag(row: Any, key: str) -> str:
    """Return the value of a checked row's `key`, which selects the row's teacher.

    Raises:
        BadRow: "no tag" or "wrong type".
    """
    if row.get(key) in (None, ""):
        raise BadRow("no tag", f"a row needs {key}, which selects its teacher")
    return _require(row[key], str, key)


def _teacher_prompt(row: dict[str, Any]) -> str | None:
    if "teacher_prompt" not in row:
        return None
    text = _require(row["teacher_prompt"], str, "teacher_prompt")
    if not text.strip():
        raise BadRow("empty teacher_prompt", "teacher_prompt is empty; null, or no such key, if the teacher has none")
    return text


def _token_ids(row: dict[str, Any], allows_prompts: bool) -> TokenIds:
    prompt = _ids(row["prompt_token_ids"], "prompt_token_ids")
    names = ("response_token_ids", "teacher_prompt_token_ids")
    response, teacher_prompt = (_ids(row[name], name) if name in row else None for name in names)
    if response is None and not allows_prompts:
        raise BadRow("no assistant turn", f"the row has prompt_token_ids but no response_token_ids; {_ONLY_ALONE}")
    return TokenIds(prompt, response, teacher_prompt, _require(row.get("masked", False), bool, "masked"))


def _ids(ids: Any, name: str) -> list[int]:
    for index, token in enumerate(_require(ids, list, name)):
        if isinstance(token, bool) or not isinstance(token, int):
            raise BadRow("wrong type", f"{name}[{index}] must be a token id, but is {token!r}")
    if not ids:
        raise BadRow("empty response" if name.startswith("response") else "empty prompt", f"{name} is empty")
    return ids


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    return _require(row.get("chat_template_kwargs", {}), dict, "chat_template_kwargs")


def _messages(messages: Any, name: str) -> list[dict[str, Any]]:
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(_require(messages, list, name))]


def _message(message: Any, name: str) -> dict[str, Any]:
    _require(message, dict, name)
    message = {key: value for key, value in message.items() if value is not None}
    _require(message.get("role"), str, f"{name}.role")
    if "tool_calls" in message:
        _require(message["tool_calls"], list, f"{name}.tool_calls")
        message.setdefault("content", "")
    _require(message.get("content"), str, f"{name}.content")
    return message


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return a list of JSON schemas from a list or from JSON text, the usual form in tables of unlike schemas."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow("wrong type", f"tools is text but not JSON: {error}") from error
    if not tools:
        return None
    return [_require(tool, dict, f"tools[{index}]") for index, tool in enumerate(_require(tools, list, "tools"))]


_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}


def _require(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """Return `value`; raise BadRow where it is not of type `kind`."""
    if isinstance(value, kind):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(_NAMES[kind] for kind in kinds)
    actual = "missing" if value is None else _NAMES.get(type(value), type(value).__name__)
    raise BadRow("wrong type", f"{name} must be {expected}, but is {actual}")
