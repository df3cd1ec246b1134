"""Special tokens, such as `<|im_end|>`, that are written out in the contents of a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.row_forms import Conversation, Row

_CANDIDATE = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{1,32}\]")  # a search for each of thousands of tokens takes longer
_THOUGHTS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})  # which responses are meant to have


@dataclass(frozen=True)
class SpecialTexts:
    """The texts that the tokenizer reads as special tokens, but for those around thoughts."""

    texts: frozenset[str]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTexts:
        """Return those of a tokenizer."""
        added = tokenizer.added_tokens_decoder.values()
        return cls(frozenset(token.content for token in added if token.special) - _THOUGHTS)

    def find(self, row: Row) -> str:
        """Return the first of them in a conversation and its place: `<|im_end|> in a user message`; "" for none.

        Texts without a chat template are meant to have some.
        """
        if not isinstance(row, Conversation):
            return ""
        for role, content in _contents(row):
            for text in _CANDIDATE.findall(content):
                if text in self.texts:
                    return f"{text} in {role}"
        return ""


def _contents(row: Conversation) -> Iterator[tuple[str, str]]:
    """Yield each text of the row, after what it is."""
    contents = [(f"the content of role {message['role']}", message["content"]) for message in row.messages]
    if row.teacher_prompt is not None:
        contents.append(("teacher_prompt", row.teacher_prompt))
    for role, content in contents:
        for part in [content] if isinstance(content, str) else content:
            text = part if isinstance(part, str) else part.get("text", "")
            yield role, text
