"""Stop strings are detected with the token that completes them, in any bytes."""

from __future__ import annotations

import pytest
from checkpoints import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.stop_strings import StopStringDetector, get_fast_tokenizer


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


def first_stop(prompt: list[int], token_ids: list[int]) -> int | None:
    detector = StopStringDetector(TOKENIZER, prompt, STOPS)
    return next((index for index, token_id in enumerate(token_ids) if detector.append(token_id)), None)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*STOPS, "a", "b", "ab", "\n", "日", "本", "<|end|>", "e", " "]), max_size=12), st.data()
)
def test_a_stop_is_detected_at_the_first_token_after_which_the_text_has_one(pieces, data):
    token_ids = TOKENIZER.encode("".join(pieces)).ids
    cut = data.draw(st.integers(0, len(token_ids)))  # tokens before it are the prompt's, even within a character
    prompt, completion = TOKENIZER.encode("é\nba").ids, token_ids[cut:]
    texts = [TOKENIZER.decode(completion[: i + 1], skip_special_tokens=False) for i in range(len(completion))]
    expected = next((i for i, text in enumerate(texts) if any(stop in text for stop in STOPS)), None)
    assert first_stop(prompt, completion) == expected


def test_a_stop_string_does_not_begin_in_the_prompt():
    assert first_stop(TOKENIZER.encode("b").ids, TOKENIZER.encode("a").ids + TOKENIZER.encode("b").ids) is None


def test_a_tokenizer_of_another_library_is_an_error_that_names_it():
    assert isinstance(get_fast_tokenizer(tiny_tokenizer()), Tokenizer)

    class Slow(PreTrainedTokenizer):
        def __init__(self):
            self.name_or_path = "old/model"

    with pytest.raises(
        UserError, match=r"rollout\.stop_words: .* old/model has a Slow\. Name the tokens in rollout\.stop_token"
    ):
        get_fast_tokenizer(Slow())
