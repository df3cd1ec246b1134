"""Check of a row, and what it is for the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_gkd.data.bad_row import BadRow, require
from megatron_gkd.data.forms.keys import describe_missing_response
from megatron_gkd.data.forms.messages import Message
from megatron_gkd.data.forms.recognition import Conventions, PlainPair, WrittenRow, recognize
from megatron_gkd.data.loss_weights import take_losses
from megatron_gkd.data.row_forms import Conversation, PlainText, Row, TokenIds, count_images
from megatron_gkd.data.vision.parts import (
    MISPLACED,
    VIDEO,
    Content,
    Kind,
    Media,
    PlacedContent,
    Reference,
    kind_of,
    place_images,
    read_column,
    refuse_others,
    take_references,
)

_ONLY_ALONE = "only distill.lmbda = 1, or data.prompt_only = on_policy_only, takes prompts alone"
_TEXT_ALONE = "the row has images, and the student reads text alone"


@dataclass(frozen=True)
class _Reader:
    """A row whose form is recognized, and how it is read: the arguments of `read_row`."""

    written: WrittenRow
    allows_prompts: bool
    media: Media

    @property
    def row(self) -> dict[str, Any]:
        """The row's keys."""
        return self.written.row

    def read(self) -> Row:
        """Return the row as what it is for the model."""
        row, written = self.row, self.written
        refuse_others(row, self.media)
        if not self.media.images and (row.get("images") or row.get("teacher_images")):
            raise BadRow(MISPLACED, _TEXT_ALONE)
        if written.text is not None:
            if written.text.response is None:
                self._require_prompts()
            return self._plain_text(written.text)
        if written.messages is None:
            return self._token_ids()
        if written.has_response:
            return self._conversation(written.messages)
        self._require_prompts()
        return self._build(written.messages, len(written.messages))

    def _require_prompts(self) -> None:
        if not self.allows_prompts:
            missing = describe_missing_response(self.row, self.written.prompt_key)
            raise BadRow("no assistant turn", f"{missing}; {_ONLY_ALONE}")

    def _plain_text(self, text: PlainPair) -> PlainText:
        teacher_prompt = self._teacher_prompt()
        has_column = any(self.row.get(name) for name in ("images", "teacher_images", "videos"))
        is_text = not self._place(text.prompt, "prompt").slots
        if has_column or not is_text or not isinstance(teacher_prompt, str | None):
            raise BadRow(MISPLACED, "plain text has no place for images; write the prompt as `messages`")
        return PlainText(text.prompt, text.response, teacher_prompt)

    def _conversation(self, messages: list[Message]) -> Conversation:
        roles = [message.value["role"] for message in messages]
        assistant_turns = [index for index, role in enumerate(roles) if role == "assistant"]
        if self.allows_prompts and messages and not assistant_turns:
            return self._build(messages, len(messages))
        if not assistant_turns:
            written = ", ".join(roles) or "no message at all"
            raise BadRow("no assistant turn", f"the roles are: {written}; {_ONLY_ALONE}")
        row = self._build(messages, assistant_turns[-1] + 1)
        last = row.messages[-1]
        if not (last["content"].strip() or last.get("tool_calls")):
            place = messages[assistant_turns[-1]].place.rpartition(".")[0]
            raise BadRow("empty response", f"{place} (assistant) has neither content nor tool_calls")
        return row

    def _build(self, messages: list[Message], count: int) -> Conversation:
        """Return the first `count` messages, with their images, after the row's system message."""
        row, system = self.row, self.written.system
        placed = [
            self._place(message.value["content"], message.place, is_response=message.value["role"] == "assistant")
            for message in messages
        ]
        slots = [slot for one in placed for slot in one.slots]
        images = take_references(
            slots, {"image": ("images", read_column(row, "images")), "video": ("videos", read_column(row, "videos"))}
        )
        kept = [one.value | {"content": put.content} for one, put in zip(messages, placed, strict=True)][:count]
        number = sum(len(one.slots) for one in placed[:count])
        if system is not None:
            kept.insert(0, {"role": "system", "content": system})
        return Conversation(
            kept,
            _tools(row.get("tools")),
            _template_kwargs(row),
            self._teacher_prompt(),
            images[:number],
            self._teacher_images(kept, images),
            take_losses(kept),
        )

    def _place(self, content: Any, name: str, *, is_response: bool = False) -> PlacedContent:
        placed = place_images(content, name, self.media)
        if placed.slots and not self.media.images:
            raise BadRow(MISPLACED, _TEXT_ALONE)
        if placed.slots and is_response:
            raise BadRow(MISPLACED, f"{name} (assistant) has an image; the student responds with text alone")
        return placed

    def _teacher_prompt(self) -> Content | None:
        if "teacher_prompt" not in self.row:
            return None
        content = self._place_teacher_prompt().content
        if isinstance(content, str) and not content.strip():
            reason = "teacher_prompt is empty; null, or no such key, if the teacher has none"
            raise BadRow("empty teacher_prompt", reason)
        return content

    def _place_teacher_prompt(self) -> PlacedContent:
        return self._place(self.row["teacher_prompt"], "teacher_prompt")

    def _teacher_images(
        self, messages: list[dict[str, Any]], images: tuple[Reference, ...]
    ) -> tuple[Reference, ...] | None:
        """Return the images of `teacher_prompt`; None where it has none of its own."""
        column = read_column(self.row, "teacher_images")
        if "teacher_prompt" not in self.row:
            if column:
                raise BadRow(MISPLACED, "teacher_images are those of teacher_prompt, and there is none")
            return None
        slots = self._place_teacher_prompt().slots
        if not slots and not column:
            return None
        replaced = _images_of_last_user(messages, images)
        columns: dict[Kind, tuple[str, list[Reference] | None]] = {"image": ("teacher_images", column)}
        for kind in ("image", "video"):
            if any(slot.kind == kind and slot.reference is None for slot in slots) and (
                kind == "video" or column is None
            ):
                columns[kind] = (f"{kind}s", [reference for reference in replaced if kind_of(reference) == kind])
        return take_references(slots, columns)

    def _token_ids(self) -> TokenIds:
        row = self.row
        if row.get("videos"):
            raise BadRow(VIDEO, "rows of token ids have no videos; write the prompt as `messages`")
        prompt = _ids(row["prompt_token_ids"], "prompt_token_ids")
        names = ("response_token_ids", "teacher_prompt_token_ids")
        response, teacher_prompt = (_ids(row[name], name) if name in row else None for name in names)
        if response is None and not self.allows_prompts:
            raise BadRow("no assistant turn", f"the row has prompt_token_ids but no response_token_ids; {_ONLY_ALONE}")
        masked = require(row.get("masked", False), bool, "masked")
        images, teacher_images = (read_column(row, name) for name in ("images", "teacher_images"))
        return TokenIds(
            prompt,
            response,
            teacher_prompt,
            masked,
            tuple(images or ()),
            None if teacher_images is None else tuple(teacher_images),
        )


def read_row(written: WrittenRow, *, allows_prompts: bool = False, media: Media | None = None) -> Row:
    """Return a row whose form is recognized as what it is for the model.

    Args:
        written: the row.
        allows_prompts: a row may be a prompt alone: messages without an assistant turn, or no response.
        media: what the student reads beside text; then `<image>` and `<video>` in a message stand for one.

    Raises:
        BadRow: with reason "wrong type", "no assistant turn", "empty response", "empty teacher_prompt", "number of
            images", "misplaced image", "video" or "loss".
    """
    return _Reader(written, allows_prompts, media or Media()).read()


def parse_row(
    row: Any,
    *,
    allows_prompts: bool = False,
    reads_images: bool = False,
    reads_videos: bool = False,
    conventions: Conventions | None = None,
) -> Row:
    """Recognize a row's form and read it. Keys whose value is null count as absent.

    Args:
        row: as it was written.
        allows_prompts: as `read_row` takes it.
        reads_images: the student reads images.
        reads_videos: the student reads videos.
        conventions: as `recognize` takes them.

    Raises:
        BadRow: as `recognize` and `read_row` raise it.
    """
    written = recognize(row, conventions)
    return read_row(written, allows_prompts=allows_prompts, media=Media(reads_images, reads_videos))


def _images_of_last_user(messages: list[dict[str, Any]], images: tuple[Reference, ...]) -> tuple[Reference, ...]:
    counts = [count_images(message["content"]) for message in messages]
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return images[sum(counts[: users[-1]]) : sum(counts[: users[-1] + 1])] if users else ()


def read_tag(row: Any, key: str) -> str:
    """Return the value of a checked row's `key`, which selects the row's teacher.

    Raises:
        BadRow: "no tag" or "wrong type".
    """
    if row.get(key) in (None, ""):
        raise BadRow("no tag", f"a row needs {key}, which selects its teacher")
    return require(row[key], str, key)


def _ids(ids: Any, name: str) -> list[int]:
    for index, token in enumerate(require(ids, list, name)):
        if isinstance(token, bool) or not isinstance(token, int):
            raise BadRow("wrong type", f"{name}[{index}] must be a token id, but is {token!r}")
    if not ids:
        raise BadRow("empty response" if name.startswith("response") else "empty prompt", f"{name} is empty")
    return ids


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    return require(row.get("chat_template_kwargs", {}), dict, "chat_template_kwargs")


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return a list of JSON schemas from a list or from JSON text, the usual form in tables of unlike schemas."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow("wrong type", f"tools is text but not JSON: {error}") from error
    if not tools:
        return None
    return [require(tool, dict, f"tools[{index}]") for index, tool in enumerate(require(tools, list, "tools"))]
