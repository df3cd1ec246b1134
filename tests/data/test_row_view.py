from dataclasses import replace

import numpy as np

from megatron_gkd.data.row_view import mark_spans, view_sample
from megatron_gkd.data.sample import FROM_DATASET, Sample, shift_labels


def sample_of(tokenizer, *parts):
    """`parts` are texts, or pairs with True where the text is trained on."""
    pairs = [part if isinstance(part, tuple) else (part, False) for part in parts]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text, _ in pairs]
    trained = np.repeat([is_trained for _, is_trained in pairs], [len(one) for one in ids])
    input_ids = np.concatenate(ids)
    return Sample(input_ids, shift_labels(input_ids, trained), FROM_DATASET, 0)


def test_marks_stand_around_what_is_trained_on(tokenizer):
    sample = sample_of(tokenizer, "user: ä\n", ("日本<|im_end|>", True), "\nq", ("b", True))
    spans = view_sample(sample, tokenizer)
    assert mark_spans(spans) == "user: ä\n>>>日本<|im_end|><<<\nq>>>b<<<"
    assert sum(span.num_tokens for span in spans) == len(sample.input_ids)


def test_other_weights_are_named(tokenizer):
    sample = sample_of(tokenizer, "ab", ("cd", True))
    weighted = replace(sample, label_weights=np.where(sample.labels < 0, 1, 0.5).astype(np.float32))
    assert mark_spans(view_sample(weighted, tokenizer)) == "ab>>>[weight 0.5] cd<<<"


def test_repeated_tokens_are_counted(tokenizer):
    sample = sample_of(tokenizer, "a" + "<|endoftext|>" * 8 + "b", "<s>" * 7)
    assert mark_spans(view_sample(sample, tokenizer)) == "a[8 x <|endoftext|>]b" + "<s>" * 7


def test_the_middle_of_a_long_part_is_left_out(tokenizer):
    sample = sample_of(tokenizer, "ab" * 50, ("c" * 5, True))
    assert mark_spans(view_sample(sample, tokenizer), 10) == "ababa [... 90 characters ...] babab>>>ccccc<<<"


def test_control_characters_are_escaped(tokenizer):
    assert mark_spans(view_sample(sample_of(tokenizer, "a\x1b[31m\r\n\tb"), tokenizer)) == "a\\x1b[31m\\r\n\tb"
