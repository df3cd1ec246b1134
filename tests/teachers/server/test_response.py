"""Valid and invalid responses of a server."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_gkd.data.sample import Sample, shift_labels
from megatron_gkd.errors import ServiceError
from megatron_gkd.runtime.servers import decode
from megatron_gkd.teachers.server.response import (
    COMPLETIONS_DECODER,
    ScoreRequest,
    Scores,
    mean_difference,
    parse_response,
)

REQUEST = ScoreRequest(np.array([5, 6, 7, 8, 9]), np.array([1, 3]))


def entry(probability: float, rank: int) -> dict:
    return {"logprob": math.log(probability), "rank": rank, "decoded_token": "x"}


def response() -> dict:
    """Of the top 2: the tokens that follow are of rank 2 after position 1, and of rank 3 after position 3."""
    entries = [
        None,
        {"6": entry(0.5, 1), "1": entry(0.25, 2)},
        {"7": entry(0.3, 2), "4": entry(0.6, 1)},
        {"8": entry(0.1, 1), "4": entry(0.1, 2)},
        {"9": entry(0.125, 3), "2": entry(0.5, 1), "98": entry(0.25, 2)},
    ]
    return {"choices": [{"index": 0, "prompt_token_ids": [5, 6, 7, 8, 9], "prompt_logprobs": entries}]}


def read(content: bytes) -> Scores:
    return parse_response(decode(content, COMPLETIONS_DECODER, "http://server/v1/completions").choices[0], REQUEST, k=2)


def test_the_top_k_after_each_position():
    scores = read(json.dumps(response()).encode())
    assert scores.ids.tolist() == [[7, 4], [2, 98]] and scores.ids.dtype == np.int32
    np.testing.assert_allclose(scores.log_probs, np.log([[0.3, 0.6], [0.5, 0.25]]), rtol=1e-6)


def test_the_value_for_minus_infinity_is_converted():
    changed = response()
    for one in changed["choices"][0]["prompt_logprobs"][4].values():
        one["logprob"] = -9999.0
    scores = read(json.dumps(changed).encode())
    assert np.isneginf(scores.log_probs).tolist() == [[False, False], [True, True]]


def spoil(*path):
    """Return the response with another value, the last of `path`, at the others."""
    changed = response()
    place = changed["choices"][0]
    *keys, value = path
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return json.dumps(changed).encode()


LOGS = "prompt_logprobs"
WRONG = {
    "other ids": (spoil("prompt_token_ids", 4, 3), "other token ids than the request"),
    "fewer positions": (spoil(LOGS, response()["choices"][0][LOGS][:4]), "has 4 positions; the request has 5"),
    "a position without": (spoil(LOGS, 2, None), "at position 1 lacks the token 7"),
    "a position of another kind": (spoil(LOGS, 2, [1]), "no log-probabilities at position 1"),
    "another token": (spoil(LOGS, 4, {"2": entry(0.5, 1), "98": entry(0.2, 2)}), "lacks the token 9 that"),
    "too few tokens": (spoil(LOGS, 4, {"9": entry(0.5, 1)}), "at position 3 has 1 tokens; the request is for 2"),
    "an id of 70 bits": (spoil(LOGS, 2, {str(2**70): entry(0.5, 1)}), "no log-probabilities at position 1"),
    "a negative id": (spoil(LOGS, 2, {"-1": entry(0.5, 1), "7": entry(0.2, 2)}), "no log-probabilities at position 1"),
    "null": (spoil(LOGS, 2, "7", "logprob", None), "no log-probabilities at position 1"),
    "text": (spoil(LOGS, 2, "7", "logprob", "x"), "no log-probabilities at position 1"),
    "logits": (spoil(LOGS, 2, "7", "logprob", 3.5), "the largest is 3.5, .* --logprobs-mode raw_logprobs"),
    "too much mass": (spoil(LOGS, 2, "7", "logprob", math.log(0.5)), "probabilities add up to 1.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_response_is_a_clear_error(name):
    content, message = WRONG[name]
    with pytest.raises(ServiceError, match=message):
        read(content)


def test_positions_without_labels_are_not_parsed():
    read(spoil(LOGS, 1, "nothing"))


def sample_of(ids: list[int], trained: list[int]) -> Sample:
    ids = np.array(ids)
    return Sample(ids, shift_labels(ids, np.isin(np.arange(len(ids)), trained)), "dataset", 0)


def test_a_request_ends_with_the_token_after_the_last_label():
    question = ScoreRequest.from_sample(sample_of([5, 6, 7, 8, 9], trained=[2, 3]))
    assert question.token_ids.tolist() == [5, 6, 7, 8] and question.positions.tolist() == [1, 2]
    assert ScoreRequest.from_sample(sample_of([5, 6, 7], trained=[])) is None


def test_equal_requests_have_equal_keys_and_different_ones_do_not():
    one = ScoreRequest.from_sample(sample_of([5, 6, 7, 8], trained=[2, 3]))
    assert one.key == ScoreRequest.from_sample(sample_of([5, 6, 7, 8], trained=[2, 3])).key
    others = [sample_of([5, 6, 7, 8], trained=[3]), sample_of([5, 6, 7, 9], trained=[2, 3])]
    assert len({one.key, *(ScoreRequest.from_sample(other).key for other in others)}) == 3


def scores(*rows: dict[int, float]) -> Scores:
    ids, log_probs = [list(row) for row in rows], [list(row.values()) for row in rows]
    return Scores(np.array(ids, dtype=np.int32), np.array(log_probs, dtype=np.float32))


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({1: -1.0, 2: -2.0}, {2: -2.0, 1: -1.0}, 0.0),
        ({1: -1.0, 2: -2.0}, {1: -1.5, 2: -2.5}, 0.5),
        ({1: -1.0, 2: -2.0}, {1: -1.0, 3: -2.0}, 0.0),  # almost equal tokens that change places at the end of the top-k
        ({1: -1.0, 2: -2.0}, {3: -1.0, 4: -4.0}, (3.0 + 2.0 + 1.0 + 0.0) / 4),
        ({1: -1.0, 2: -math.inf}, {1: -1.0, 2: -math.inf}, 0.0),
        ({1: -1.0, 2: -math.inf}, {1: -1.0, 3: -math.inf}, 0.0),
        ({1: -1.0, 2: -5.0}, {1: -1.0, 2: -math.inf}, math.inf),
    ],
)
def test_the_mean_difference_of_two_models(a, b, difference):
    assert mean_difference(scores(a), scores(b)) == pytest.approx(difference)
    assert mean_difference(scores(b), scores(a)) == pytest.approx(difference)
