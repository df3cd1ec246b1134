"""Tokenizers with a token for every byte: of Qwen's naming, of SentencePiece's, and with DeepSeek's control tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"o", b"x")]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|box_start|>", "<tool_call>"]
DEEPSEEK = [
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜begin▁of▁sentence｜>",
    "<think>",
    "<tool_call>",
]
"""The control tokens of DeepSeek-R1-Distill-Qwen, which have the ids of Qwen's; the last is the same in both."""
FIRST_ADDED = 256 + len(MERGES)


def byte_level_tokenizer(added: Sequence[str] = QWEN) -> PreTrainedTokenizerFast:
    """Return a tokenizer that writes " the" as `Ġthe`."""
    letters = bytes_to_unicode()
    return _build(lambda token: "".join(letters[byte] for byte in token), added, is_byte_level=True)


def sentencepiece_tokenizer(added: Sequence[str] = QWEN) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same ids that writes " the" as `▁the`, and other bytes than letters as `<0xE4>`."""

    def name(token: bytes) -> str:
        if len(token) == 1 and not 32 <= token[0] < 127:
            return f"<0x{token[0]:02X}>"
        return token.decode().replace(" ", "▁")

    return _build(name, added, is_byte_level=False)


def _build(name, added: Sequence[str], *, is_byte_level: bool) -> PreTrainedTokenizerFast:
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in MERGES]
    vocabulary = {name(token): index for index, token in enumerate(tokens)}
    merges = [(name(left), name(right)) for left, right in MERGES]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=not is_byte_level))
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=added[0], pad_token=added[0])
