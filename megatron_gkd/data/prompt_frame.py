"""What a shortened prompt keeps: the tokens of the chat template before and after the contents of its turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np

from megatron_gkd.data.row_forms import Conversation, Row, count_images
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.placeholders import expand_placeholders

_PROBE = "probe-of-the-chat-template"


@dataclass(frozen=True)
class Frame:
    """Tokens of a prompt that do not belong to the contents of its turns.

    Attributes:
        header: number of tokens before the content of the first turn: BOS, tools, system message, the turn's role; and
            the images that begin it.
        footer: number of tokens after the content of the last turn, at least 1: its end, and the role that responds.
    """

    header: int = 0
    footer: int = 1


@dataclass
class FrameFinder:
    """Find the frames of prompts that `renderer` has rendered."""

    renderer: RowRenderer

    def find(self, row: Row, prompt: np.ndarray, images: Sequence[Image] = ()) -> Frame:
        """Return what a shortened prompt must keep.

        Args:
            row: a checked row.
            prompt: int64 [P], as it is rendered, with the tokens of its images.
            images: those that the row refers to.
        """
        renderer = self.renderer
        if not isinstance(row, Conversation):
            bos = renderer.tokenizer.bos_token_id
            return Frame(int(bos is not None and prompt[0] == bos), 1)
        header, number = self._render_header(row)
        ids = np.array(renderer.encode(header)["input_ids"], dtype=np.int64)
        if number and renderer.processing is not None:
            ids, _ = expand_placeholders(ids, np.full_like(ids, IGNORED_LABEL), images[:number], renderer.processing)
        footer = np.array(renderer.encode(self._footer)["input_ids"], dtype=np.int64)
        return Frame(_count_same(ids, prompt), max(1, _count_same(footer[::-1], prompt[::-1])))

    def _render_header(self, row: Conversation) -> tuple[str, int]:
        """Return the text before the content of the first turn, with the images that begin it, and their number."""
        first = next((i for i, one in enumerate(row.messages) if one["role"] not in ("system", "developer")), 0)
        messages, content = list(row.messages), row.messages[first]["content"]
        leading: list[Any] = [] if isinstance(content, str) else list(takewhile(_is_image, content))
        probe = [*leading, {"type": "text", "text": _PROBE}] if leading else _PROBE
        messages[first] = {**messages[first], "content": probe}
        text = self.renderer.render_text(replace(row, messages=messages), first + 1)
        if _PROBE not in text:  # the template changes it
            return "", 0
        number = sum(count_images(message["content"]) for message in messages[: first + 1])
        return text.partition(_PROBE)[0], number

    @cached_property
    def _footer(self) -> str:
        """The text from the end of a user message's content to the response."""
        probe = Conversation([{"role": "user", "content": _PROBE}])
        return self.renderer.render_text(probe, 1, add_generation_prompt=True).rpartition(_PROBE)[2]


def _is_image(part: Any) -> bool:
    return part["type"] in ("image", "video")


def _count_same(some: np.ndarray, others: np.ndarray) -> int:
    """Return the number of tokens that both begin with."""
    length = min(len(some), len(others))
    return int(np.logical_and.accumulate(some[:length] == others[:length]).sum())
