"""Recognition of the form that a row is written in."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.data.bad_row import BadRow, name_type, require
from megatron_gkd.data.forms.keys import (
    ALPACA_RESPONSES,
    BESIDE_MESSAGES,
    CONFLICT,
    CONVERSATIONS,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    choose,
    describe_missing,
    use_known_names,
)
from megatron_gkd.data.forms.messages import Message, read_messages
from megatron_gkd.data.forms.written import read_written

NOT_AN_OBJECT = "not an object"  # why a row is bad
TOKEN_IDS = "token ids"
_USE_TEMPLATE = "name the prompt `query` (data.columns: {prompt: query}), or write `messages`, to use the chat template"


@dataclass(frozen=True)
class Conventions:
    """What rows are read by, beside their own keys.

    Attributes:
        system: the system message of conversations that have none of their own.
        template_roles: roles that the chat template knows beside the usual ones.
    """

    system: str | None = None
    template_roles: Set[str] = frozenset()


@dataclass(frozen=True)
class PlainPair:
    """A prompt as text and its response, None where there is none."""

    prompt: str
    response: str | None


@dataclass(frozen=True)
class WrittenRow:
    """A row whose form is recognized.

    Attributes:
        form: for people: the keys, and what they become.
        row: all keys of the row, the known ones in lower case, without nulls.
        messages: of a conversation; None for another form.
        text: the text and its continuation; None for another form.
        system: the system message to put before the messages.
        has_response: False where the conversation is a prompt alone, whatever its last message.
        prompt_key: the key of the prompt.
    """

    form: str
    row: dict[str, Any]
    messages: list[Message] | None = None
    text: PlainPair | None = None
    system: str | None = None
    has_response: bool = True
    prompt_key: str = "prompt"


def recognize(row: Any, conventions: Conventions | None = None) -> WrittenRow:
    """Return the row in the form that its keys make.

    Raises:
        BadRow: "not an object", "conflicting keys", "no messages", "wrong type", "unknown role" or "empty response".
    """
    row = require_object(row)
    return _Recognizer(use_known_names(row), conventions or Conventions()).recognize()


def require_object(row: Any) -> dict[str, Any]:
    """Return a row that is an object.

    Raises:
        BadRow: "not an object".
    """
    if isinstance(row, dict):
        return row
    raise BadRow(NOT_AN_OBJECT, f"a row must be an object, but this one is {name_type(row)}")


@dataclass
class _Recognizer:
    """A row with known names, and the system message of its own."""

    row: dict[str, Any]
    conventions: Conventions
    system: str | None = field(init=False)

    def __post_init__(self) -> None:
        key = choose(self.row.keys(), SYSTEMS, "system message")
        text = "" if key is None else require(self.row[key], str, key)
        self.system = text if text.strip() else None

    def recognize(self) -> WrittenRow:
        row = self.row
        if "prompt_token_ids" in row:  # before the text that may stand beside them for people
            return WrittenRow(TOKEN_IDS, row)
        if any(name in row for name in CONVERSATIONS):
            return self._messages()
        # The input of an instruction is a part of the prompt, and none of its own.
        names = row.keys() - {"input"} if "instruction" in row else row.keys()
        prompt_key = choose(names, PROMPTS, "prompt")
        if prompt_key == "instruction":
            return self._alpaca()
        response_key = choose(names, RESPONSES, "response")
        if prompt_key is not None:
            return self._pair(prompt_key, response_key)
        if response_key == "text":
            return self._plain("text", "", "text")
        raise BadRow("no messages", describe_missing(row))

    def _messages(self) -> WrittenRow:
        row = self.row
        key = choose(row.keys(), (CONVERSATIONS,), "conversation")
        assert key is not None
        messages = self._read(row[key], key)
        contents = [message.value["content"] for message in messages]
        beside = [name for name in BESIDE_MESSAGES if row.get(name) and row[name] not in contents]
        if row.get("history") and read_written(row["history"], "history"):
            beside.append("history")
        if beside:
            raise BadRow(
                CONFLICT,
                f"{key} beside {' and '.join(beside)}, and no message has that content; remove or rename one of them "
                f"(data.columns: {{{beside[0]}: unused_{beside[0]}}})",
            )
        return self._conversation(key, messages)

    def _alpaca(self) -> WrittenRow:
        row = self.row
        parts = [require(row.get(name, ""), str, name) for name in ("instruction", "input")]
        prompt = "\n".join(part for part in parts if part)
        response = choose(row.keys(), ALPACA_RESPONSES, "response")
        return self._exchange("instruction + input", "instruction", prompt, response)

    def _pair(self, prompt_key: str, response_key: str | None) -> WrittenRow:
        row = self.row
        prompt = require(row[prompt_key], (str, list), prompt_key)
        is_chat = isinstance(prompt, list)
        if response_key == "completion" and isinstance(row["completion"], list):
            return self._chat_completion(prompt_key, prompt)
        if prompt_key == "prompt" and not is_chat and response_key in (None, "response", "completion"):
            keys = "prompt" if response_key is None else f"prompt + {response_key}"
            return self._plain(keys, prompt, response_key)
        return self._exchange(prompt_key, prompt_key, prompt, response_key)

    def _chat_completion(self, prompt_key: str, prompt: Any) -> WrittenRow:
        """Return the form of a prompt and a completion that are messages both."""
        if not isinstance(prompt, list):
            reason = f"{prompt_key} must be a list of messages as completion is, but is {name_type(prompt)}"
            raise BadRow("wrong type", reason)
        messages = self._prompt_messages(prompt_key, prompt)
        completion = self._read(self.row["completion"], "completion")
        if all(message.value["role"] != "assistant" for message in completion):
            raise BadRow("no assistant turn", "completion has no message of the assistant")
        return self._conversation(f"{prompt_key} + completion (messages)", [*messages, *completion], prompt_key)

    def _plain(self, keys: str, prompt: str, response_key: str | None) -> WrittenRow:
        beside = ["system"] if self.system is not None else []
        if self.row.get("history") and read_written(self.row["history"], "history"):
            beside.append("history")
        if beside:
            raise BadRow(
                CONFLICT,
                f"{' and '.join(beside)} beside a prompt that is text without a chat template; {_USE_TEMPLATE}",
            )
        response = None if response_key is None else self._response(response_key)
        return WrittenRow(f"{keys} (plain text)", self.row, text=PlainPair(prompt, response))

    def _exchange(self, keys: str, prompt_key: str, prompt: Any, response_key: str | None) -> WrittenRow:
        """Return the form of a prompt and a response that are a conversation."""
        messages = self._prompt_messages(prompt_key, prompt)
        if response_key is None:
            return self._conversation(keys, messages, prompt_key, has_response=False)
        response = Message({"role": "assistant", "content": self._response(response_key)}, response_key)
        return self._conversation(f"{keys} + {response_key}", [*messages, response], prompt_key)

    def _prompt_messages(self, key: str, prompt: Any) -> list[Message]:
        """Return the messages of the history and the prompt."""
        history = self._history()
        if isinstance(prompt, list):
            if history:
                raise BadRow(CONFLICT, f"history beside {key}, which is a list of messages; put all into {key}")
            return self._read(prompt, key)
        if not prompt.strip():
            raise BadRow("empty prompt", f"{key} is empty")
        return [*history, Message({"role": "user", "content": prompt}, key)]

    def _history(self) -> list[Message]:
        messages = []
        history = read_written(self.row.get("history") or [], "history")
        for index, pair in enumerate(require(history, list, "history")):
            place = f"history[{index}]"
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadRow("wrong type", f"{place} must be a list of a query and its response")
            for number, role in enumerate(("user", "assistant")):
                place_of_text = f"{place}[{number}]"
                content = require(pair[number], str, place_of_text)
                messages.append(Message({"role": role, "content": content}, place_of_text))
        return messages

    def _response(self, key: str) -> str:
        """Return the text of a response; of an answer that is a list the first one."""
        value = self.row[key]
        if key not in RESPONSES[0]:
            value = value[0] if isinstance(value, list) and value else value
            value = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        text: str = require(value, str, key)
        if not text.strip():
            raise BadRow("empty response", f"{key} is empty")
        return text

    def _read(self, messages: Any, name: str) -> list[Message]:
        return read_messages(messages, name, self.conventions.template_roles)

    def _conversation(
        self, form: str, messages: list[Message], prompt_key: str = "prompt", *, has_response: bool = True
    ) -> WrittenRow:
        system = self.system
        if messages and messages[0].value["role"] in ("system", "developer"):
            if system not in (None, messages[0].value["content"]):
                raise BadRow(CONFLICT, "system beside messages that begin with a system message; remove one of them")
            system = None
        elif system is None and not (len(messages) == 1 and messages[0].value["role"] == "assistant"):
            system = self.conventions.system  # a lone message of the assistant is text for pre-training
        return WrittenRow(form, self.row, messages, system=system, has_response=has_response, prompt_key=prompt_key)
