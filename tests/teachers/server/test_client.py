"""What a server is refused for before the first step, and what it is waited for."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from checkpoints import tiny_checkpoint, tiny_tokenizer
from teachers.contract import CHECKPOINT, transformers_log_probs
from teachers.fake_server import FakeServer

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.runtime.servers import ServerDown, open_client
from megatron_gkd.teachers.server import client
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer, handshake_all
from megatron_gkd.teachers.server.response import ScoreRequest
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

PROBES = tokenizer_probes(tiny_tokenizer())


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer(CHECKPOINT()) as server:
        yield server


def client_of(fake: FakeServer, k: int = 4, timeout: float = 10.0, max_length: int = 256) -> TeacherServer:
    return TeacherServer(fake.url + "/", open_client(timeout, 4), TeacherRequirements(k, max_length, PROBES))


def test_the_handshake_returns_the_model_and_the_known_prompt(fake):
    server = client_of(fake)
    identity = server.handshake(max_downtime=5.0)
    assert identity.name == "teacher"
    ids = [i for probe in PROBES for i in probe.ids][:32]
    expected = transformers_log_probs(CHECKPOINT(), ids, range(31)).topk(4).values
    np.testing.assert_allclose(np.sort(identity.scores.log_probs)[:, ::-1], expected, atol=1e-5)


def test_the_probes_see_the_whole_vocabulary():
    """A small one: every token of it."""
    assert {i for probe in PROBES for i in probe.ids} == set(tiny_tokenizer().get_vocab().values())


def swapped():
    """w3 and w4 in each other's place."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.backend_tokenizer.to_str().replace('"w3"', '"?"').replace('"w4"', '"w3"').replace('"?"', '"w4"')
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text),
        unk_token="<|unk|>",
        pad_token="<|endoftext|>",
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (swapped(), r"2 differences, id \d+ is 'w\d' for the student and 'w\d' for the teacher; id \d+ is"),
        (tiny_tokenizer(prefix="v"), "60 differences, the first are: .*: name a teacher of the student's family"),
        (tiny_tokenizer(num_words=59), r"\d+ differences"),
    ],
)
def test_another_tokenizer_is_refused(other, message, fake):
    fake.tokenizer = other
    with pytest.raises(UserError, match=f"{fake.url}: its tokenizer is not the student's: {message}"):
        client_of(fake).handshake(max_downtime=5.0)


def test_the_same_ids_of_other_tokens_are_refused(fake):
    names = fake.tokenizer.convert_ids_to_tokens
    fake.tokenizer.convert_ids_to_tokens = lambda ids: ["W9" if name == "w9" else name for name in names(ids)]
    with pytest.raises(UserError, match="1 difference, id 13 is 'w9' for the student and 'W9' for the teacher"):
        client_of(fake).handshake(max_downtime=5.0)


def test_more_log_probabilities_than_the_server_allows_are_refused(fake):
    message = (
        r"65, which is greater than max allowed: 64.* for 65 tokens \(distill.gkd_logits_topk\) start it with --max-"
        "logprobs 65"
    )
    with pytest.raises(UserError, match=message):
        client_of(fake, k=65).handshake(max_downtime=5.0)


def test_shorter_sequences_than_the_longest_are_refused(fake):
    fake.max_model_len = 256
    with pytest.raises(UserError, match=r"up to 256 tokens.* data.max_length = 256: start it with --max-model-len 257"):
        client_of(fake).handshake(max_downtime=5.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"detail": "Not Found"}), "404: .*Not Found.*; check that a vLLM server listens there"),
        ((200, b"<html>"), "the response is not that of a vLLM server .*<html>"),
        ((200, {"data": []}), "the response is not that of a vLLM server"),
        ((200, {"data": [{"id": "gpt"}]}), "gpt has no max_model_len; check that a vLLM server"),
    ],
)
def test_something_else_than_vllm_is_refused(answer, message, fake):
    fake.answer = lambda path, body: answer
    with pytest.raises(UserError, match=f"{fake.url}/v1/models: {message}"):
        client_of(fake).handshake(max_downtime=5.0)


def test_an_unreachable_server_is_a_clear_error(fake):
    fake.stop()
    with pytest.raises(
        ServiceError, match=rf"{fake.url}/v1/models: ConnectError.* 0.2 s \(teacher.teacher_server_max_downtime_s"
    ):
        client_of(fake).handshake(max_downtime=0.2)


def test_the_handshake_waits_for_a_server_that_starts(fake):
    fake.stop()
    threading.Timer(0.5, fake.start).start()
    client_of(fake).handshake(max_downtime=20.0)


def test_a_slow_response_times_out_and_the_next_attempt_may_succeed(fake):
    server = client_of(fake, timeout=0.3)
    server.handshake(max_downtime=5.0)
    question = ScoreRequest(np.array([5, 6, 7]), np.array([0, 1]))
    fake.delays = [1.5]
    with pytest.raises(ServerDown, match="ReadTimeout"):
        server.score(question)
    assert server.down_since is not None and server.down_since <= time.monotonic()
    assert server.score(question).ids.shape == (2, 4) and server.down_since is None


def test_a_request_that_is_refused_is_an_error_at_once(fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    with pytest.raises(UserError, match=r"400: .*maximum context length is 257"):
        server.score(ScoreRequest(np.full(257, 5), np.array([0])))


def test_servers_of_different_models_are_refused(fake):
    with FakeServer(OTHER()) as other:
        with pytest.raises(UserError, match=f"{other.url} and {fake.url}: serve different models; .* differ by"):
            handshake_all([client_of(fake), client_of(other)], max_downtime=5.0)
        identities = handshake_all([client_of(fake), client_of(fake)], max_downtime=5.0)
        assert [identity.name for identity in identities] == ["teacher", "teacher"]


OTHER = functools.partial(tiny_checkpoint, "qwen3", seed=1)
REQUEST = ScoreRequest(np.array([5, 6, 7]), np.array([0, 1]))


def lose_a_connection(fake: FakeServer, server: TeacherServer) -> None:
    fake.stop()
    with pytest.raises(ServerDown):
        server.score(REQUEST)


def test_a_handshake_follows_a_lost_connection_before_the_next_request(fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    first, handshake = server.score(REQUEST), fake.asked[:-1]
    lose_a_connection(fake, server)
    fake.start()
    before = len(fake.asked)
    again = server.score(REQUEST)
    assert fake.asked[before:] == [*handshake, "/v1/completions"]
    np.testing.assert_array_equal(again.log_probs, first.log_probs)
    server.score(REQUEST)
    assert len(fake.asked) == before + len(handshake) + 2, "once"


ANOTHER = (
    r"serves another model than at the start of the run \(as teacher\): .* differ by .* nats on average, allowed are "
    r"0.1; start it with the model that it served \(teacher\)"
)


def test_another_model_under_the_same_name_is_refused_after_a_lost_connection(fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    lose_a_connection(fake, server)
    fake.checkpoint = OTHER()
    fake.start()
    for _ in range(2):  # it stays refused
        with pytest.raises(ServiceError, match=f"{fake.url}: {ANOTHER}"):
            server.score(REQUEST)


def test_the_handshake_after_a_lost_connection_is_the_whole_one(fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    lose_a_connection(fake, server)
    fake.tokenizer = swapped()
    fake.start()
    with pytest.raises(UserError, match="its tokenizer is not the student's"):
        server.score(REQUEST)


def test_a_response_is_rejected_if_another_thread_lost_its_connection_meanwhile(fake):
    server = client_of(fake, timeout=0.5)
    server.handshake(max_downtime=5.0)
    fake.delays = [0.8, 0.2]
    fake.max_model_len = 256  # what a new handshake would find

    def fail() -> None:
        with pytest.raises(ServerDown):
            server.score(REQUEST)

    slow = threading.Thread(target=fail)
    slow.start()
    time.sleep(0.35)
    with pytest.raises(UserError, match="up to 256 tokens"):
        server.score(REQUEST)
    slow.join()


def test_a_check_finds_another_model_without_a_lost_connection(fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    server.check()
    fake.checkpoint = OTHER()
    with pytest.raises(ServiceError, match=ANOTHER):
        server.check()
    fake.stop()
    server.check()  # whoever scores will find that it is down


def test_another_model_after_a_pause_is_refused_before_it_scores(fake, monkeypatch):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    before = len(fake.asked)
    server.score(REQUEST)
    assert fake.asked[before:] == ["/v1/completions"], "there was no pause"
    monkeypatch.setattr(client, "_MAX_PAUSE", -1.0)
    before = len(fake.asked)
    server.score(REQUEST)
    assert fake.asked[before:] == ["/v1/models", "/v1/completions", "/v1/completions"]
    fake.stop()
    fake.checkpoint = OTHER()  # no request was in flight, and the next one makes a new connection
    fake.start()
    for _ in range(2):
        with pytest.raises(ServiceError, match=ANOTHER):
            server.score(REQUEST)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_small_differences_are_the_same_model(noise, fake):
    server = client_of(fake)
    server.handshake(max_downtime=5.0)
    generator = np.random.default_rng(0)

    def spoil(response):
        for entries in response["choices"][0]["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["logprob"] += noise * generator.standard_normal() - noise

    fake.spoil = spoil
    lose_a_connection(fake, server)
    fake.start()
    server.score(REQUEST)
