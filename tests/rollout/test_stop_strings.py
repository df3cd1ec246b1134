"""Stop strings are found with the token that completes them, in any bytes."""

from __future__ import annotations

import pytest
from checkpoints import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.stop_strings import StopStringWatch, decoder_of


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, and some pairs are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: index for index, sign in enumerate([*alphabet, "ab", "ba", "\u010a\u010a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "a"), ("\u010a", "\u010a")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()
STOPS = ["\n\n", "bab", "é", "日本", "b<|end|>"]


def first_found(prompt: list[int], token_ids: list[int]) -> int | None:
    watch = StopStringWatch(TOKENIZER, prompt, STOPS)
    return next((index for index, token_id in enumerate(token_ids) if watch.found(token_id)), None)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*STOPS, "a", "b", "ab", "\n", "日", "本", "<|end|>", "e", " "]), max_size=12), st.data()
)
def test_it_is_the_first_token_after_which_the_whole_text_has_one(pieces, data):
    token_ids = TOKENIZER.encode("".join(pieces)).ids
    cut = data.draw(st.integers(0, len(token_ids)))  # what comes before is the prompt, even in mid-character
    prompt, completion = TOKENIZER.encode("é\nba").ids, token_ids[cut:]
    texts = [TOKENIZER.decode(completion[: i + 1], skip_special_tokens=False) for i in range(len(completion))]
    expected = next((i for i, text in enumerate(texts) if any(stop in text for stop in STOPS)), None)
    assert first_found(prompt, completion) == expected


def test_the_prompt_is_no_part_of_it():
    assert first_found(TOKENIZER.encode("b").ids, TOKENIZER.encode("a").ids + TOKENIZER.encode("b").ids) is None


def test_a_tokenizer_of_another_library_is_refused_by_name():
    assert isinstance(decoder_of(tiny_tokenizer()), Tokenizer)

    class Slow(PreTrainedTokenizer):
        def __init__(self):
            self.name_or_path = "old/model"

    with pytest.raises(
        UserError, match="rollout.stop_words: .* old/model has a Slow. Name the tokens in rollout.stop_token"
    ):
        decoder_of(Slow())
