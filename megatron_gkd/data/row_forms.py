"""The forms of a checked row: a conversation, a text and its continuation, token ids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.parts import Content, Reference, kind_of


@dataclass(frozen=True)
class Conversation:
    """Messages for the chat template.

    The last one is an assistant turn; later messages are removed. A prompt alone has no such turn.

    Attributes:
        messages: their contents are texts, or parts where they have images.
        tools: JSON schemas.
        template_kwargs: arguments of the chat template.
        teacher_prompt: content that the teacher reads in place of the last user message's.
        images: those of the messages, and the videos among them, in order.
        teacher_images: those of `teacher_prompt`; None: those of the message that it replaces.
        losses: the weight that the row gives to each message, None where it gives none; empty where it gives none to
            any.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_prompt: Content | None = None
    images: tuple[Reference, ...] = ()
    teacher_images: tuple[Reference, ...] | None = None
    losses: tuple[float | None, ...] = ()

    @property
    def has_response(self) -> bool:
        """Whether the row is more than a prompt."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def for_teacher(self) -> Conversation:
        """Return the row with `teacher_prompt` as the content of the last user message.

        A `teacher_prompt` without images of its own follows those of the message.

        Raises:
            BadRow: "no user message".
        """
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise BadRow("no user message", "teacher_prompt replaces the last user message, and there is none")
        messages, prompt = list(self.messages), self.teacher_prompt
        counts = [count_images(message["content"]) for message in messages]
        start, end = sum(counts[: users[-1]]), sum(counts[: users[-1] + 1])
        images = self.images[start:end] if self.teacher_images is None else self.teacher_images
        if images and isinstance(prompt, str):
            prompt = [*({"type": kind_of(image)} for image in images), {"type": "text", "text": prompt}]
        messages[users[-1]] = {**messages[users[-1]], "content": prompt}
        return replace(
            self,
            messages=messages,
            teacher_prompt=None,
            images=(*self.images[:start], *images, *self.images[end:]),
            teacher_images=None,
        )


@dataclass(frozen=True)
class PlainText:
    """Plain text and its continuation (None where a prompt alone is a row), without a chat template."""

    prompt: str
    response: str | None
    teacher_prompt: str | None = None

    @property
    def has_response(self) -> bool:
        """Whether the row is more than a prompt."""
        return self.response is not None

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
        images: those whose tokens are in `prompt`, in order.
        teacher_images: those whose tokens are in `teacher_prompt`; None: the same.
    """

    prompt: list[int]
    response: list[int] | None
    teacher_prompt: list[int] | None = None
    masked: bool = False
    images: tuple[Reference, ...] = ()
    teacher_images: tuple[Reference, ...] | None = None

    @property
    def has_response(self) -> bool:
        """Whether the row is more than a prompt."""
        return self.response is not None

    def for_teacher(self) -> TokenIds:
        """Return the row with `teacher_prompt` as the prompt."""
        prompt = self.prompt if self.teacher_prompt is None else self.teacher_prompt
        images = self.images if self.teacher_images is None else self.teacher_images
        return TokenIds(prompt, self.response, images=images)


Row = Conversation | PlainText | TokenIds


def as_plain_text(row: Row) -> Row:
    """Return a lone assistant message, ms-swift's form of text for pre-training, as plain text; other rows as is."""
    if not isinstance(row, Conversation) or row.tools or row.images or row.teacher_prompt is not None:
        return row
    first = row.messages[0]
    if len(row.messages) > 1 or first["role"] != "assistant" or first.keys() > {"role", "content"}:
        return row
    return PlainText("", first["content"])


def count_images(content: Content) -> int:
    """Return the number of images and videos in the content of a message."""
    return 0 if isinstance(content, str) else sum(part["type"] in ("image", "video") for part in content)
