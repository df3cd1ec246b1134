"""Detect stop strings in a completion, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError


class StopStringDetector:
    """Decode one completion as it grows, special tokens included, and keep only the text that a stop string needs.

    A stop string may begin in one token and end within another. It has to be in the completion as a whole; the prompt
    is context for the decoder. vLLM finds stop strings in the same way, with the same decoder.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)
        self._longest = max(map(len, stop_strings))
        self._tail = ""

    def append(self, token_id: int) -> bool:
        """Append a token to the completion and return whether the completion contains a stop string now."""
        self._tail += self._decode(token_id)
        has_stop_string = any(stop in self._tail for stop in self._stop_strings)
        self._tail = self._tail[max(0, len(self._tail) - self._longest + 1) :]
        return has_stop_string

    def _decode(self, token_id: int) -> str:
        """Return the text that the token adds: none while the completion ends within a character."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # invalid UTF-8, after which the library's stream is of no more use
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._tokenizer, token_id) or ""


def get_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the tokenizer of the tokenizers library behind `tokenizer`, which `StopStringDetector` decodes with.

    Raises:
        UserError: there is none, as the checkpoint has no tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            "rollout.stop_words: needs a tokenizer of the tokenizers library (tokenizer.json); "
            f"{tokenizer.name_or_path} has a {type(tokenizer).__name__}. Name the tokens in rollout.stop_token_ids "
            "instead"
        )
    return backend
