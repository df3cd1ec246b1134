"""The token by which a chat template ends an assistant turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

_PROBE = "probe-of-the-chat-template"
_QUESTION = {"role": "user", "content": _PROBE}
_CONVERSATION = [_QUESTION, {"role": "assistant", "content": _PROBE}]
_MARKER_OF_TEXT = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_MARKER = re.compile(r"[<\[].*\S.*[>\]]")  # the form of control tokens: <...> or [...]


def find_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> int | None:
    """Return the id of the control token that follows the content of an assistant turn.

    It is found by rendering: `<|im_end|>` in ChatML, `<|eot_id|>` in Llama 3. Templates that end a conversation with
    the content (GLM's) begin the next turn with a token of its role, which is returned then.

    Args:
        tokenizer: with the chat template.
        template_kwargs: arguments of the template.

    Returns:
        None where there is no template, it can't be rendered, or text follows the content: a token of text may be a
        part of a response.
    """
    tail = _find_tail(tokenizer, template_kwargs or {})
    return None if tail is None else _first_control_token(tokenizer, tail)


def find_marker_of_text(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> str | None:
    """Return what ends a turn where it looks like a control token and is none of the tokenizer: `<|im_end|>`.

    Its arguments are those of `find_end_of_turn`.
    """
    tail = _find_tail(tokenizer, template_kwargs or {})
    if tail is None or _first_control_token(tokenizer, tail) is not None:
        return None
    found = _MARKER_OF_TEXT.match(tail.lstrip())
    return None if found is None else found.group()


def _find_tail(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> str | None:
    """Return the text after the assistant's content, at the end or before the next turn; None where there is none."""
    for messages in (_CONVERSATION, [*_CONVERSATION, _QUESTION]):
        tail = _render_tail(tokenizer, messages, template_kwargs)
        if tail is None:
            return None
        if tail.strip():
            return tail
    return None


def _render_tail(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], template_kwargs: Mapping[str, Any]
) -> str | None:
    """Return the text after the assistant's content; None where it can't be found."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs))
    except Exception:  # a template is code that comes with the model; rows that need it show its error
        return None
    parts = text.split(_PROBE)
    return _PROBE.join(parts[2:]) if len(parts) == 1 + len(messages) else None


def _first_control_token(tokenizer: PreTrainedTokenizerBase, tail: str) -> int | None:
    ids = tokenizer(tail.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        return None
    added = tokenizer.added_tokens_decoder.get(ids[0])
    name = str(tokenizer.convert_ids_to_tokens(ids[0]))
    is_control = ids[0] in tokenizer.all_special_ids or (
        added is not None and (added.special or _MARKER.fullmatch(name) is not None)
    )
    return ids[0] if is_control and ids[0] != tokenizer.unk_token_id else None
