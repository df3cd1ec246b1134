"""Whether a completion contains a stop string yet, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError


class StopStringWatch:
    """Decodes one completion as it grows, special tokens included, and keeps no more of its text than a stop needs.

    A stop string may begin in one token and end within another; it has to be in the completion as a whole, and the
    prompt only tells the decoder what came before. This is how vLLM finds them, by the same decoder.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), tuple(stops)
        self._stream = DecodeStream(ids=self._prompt, skip_special_tokens=False)
        self._longest = max(map(len, stops))
        self._tail = ""

    def found(self, token_id: int) -> bool:
        """Whether the completion contains a stop string with this next token."""
        self._tail += self._next_text(token_id)
        found = any(stop in self._tail for stop in self._stops)
        self._tail = self._tail[max(0, len(self._tail) - self._longest + 1) :]
        return found

    def _next_text(self, token_id: int) -> str:
        """What the token adds; nothing while it ends within a character."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # bytes that are no text, after which the library's stream is of no more use
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._tokenizer, token_id) or ""


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What `StopStringWatch` decodes with. UserError for a tokenizer without a `tokenizer.json`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            "rollout.stop_words: needs a tokenizer of the tokenizers library (tokenizer.json); "
            f"{tokenizer.name_or_path} has a {type(tokenizer).__name__}. Name the tokens in rollout.stop_token_ids "
            "instead"
        )
    return backend
