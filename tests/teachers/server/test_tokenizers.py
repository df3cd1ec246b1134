"""Servers whose tokenizer names or numbers tokens otherwise than the student's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from byte_tokenizers import DEEPSEEK, FIRST_ADDED, QWEN, byte_level_tokenizer, sentencepiece_tokenizer
from checkpoints import tiny_checkpoint
from teachers.fake_server import FakeServer

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.models.tokenizer_comparison import Mode
from megatron_gkd.runtime.servers import ServerDown, open_client
from megatron_gkd.teachers.server.client import (
    TeacherRequirements,
    TeacherServer,
    handshake_all,
    warn_of_tokenizers,
)
from megatron_gkd.teachers.server.response import ScoreRequest
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

CHECKPOINT = functools.partial(tiny_checkpoint, "qwen3", vocab_size=300)
REQUEST = ScoreRequest(np.array([5, 6, 7]), np.array([0, 1]))


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer(CHECKPOINT(), byte_level_tokenizer()) as server:
        yield server


def client_of(fake: FakeServer, mode: Mode = "strict") -> TeacherServer:
    probes = tokenizer_probes(byte_level_tokenizer())
    return TeacherServer(fake.url, open_client(10.0, 4), TeacherRequirements(4, 256, probes, check_tokenizers=mode))


def test_the_same_bytes_under_other_names_are_accepted(fake):
    fake.tokenizer = sentencepiece_tokenizer()
    assert client_of(fake).handshake(max_downtime=5.0).differences == ()
    assert "/detokenize" not in fake.asked, "the names suffice"


def test_renamed_control_tokens_are_refused_by_id(fake):
    fake.tokenizer = byte_level_tokenizer(DEEPSEEK)
    with pytest.raises(UserError) as error:
        client_of(fake).handshake(max_downtime=5.0)
    message = str(error.value)
    assert message.startswith(f"{fake.url}: its tokenizer is not the student's: 5 differences, the first are: ")
    assert f"id {FIRST_ADDED + 1} is '<|im_start|>' for the student and '<｜User｜>' for the teacher" in message
    assert "\n" not in message


def test_a_warning_lists_them_once_for_all_servers(fake, caplog, tmp_path):
    fake.tokenizer = byte_level_tokenizer(DEEPSEEK)
    servers = [client_of(fake, "warn"), client_of(fake, "warn")]
    identities = handshake_all(servers, max_downtime=5.0)
    assert [one.subject for one in identities[0].differences] == [f"id {FIRST_ADDED + index}" for index in range(5)]
    with caplog.at_level(logging.WARNING, "megatron_gkd"):
        warn_of_tokenizers(servers, identities, tmp_path / "list.txt")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{fake.url}: its tokenizer is not the student's: 5 differences, id ")
    assert len((tmp_path / "list.txt").read_text().splitlines()) == 6
    assert servers[0].score(REQUEST).ids.shape == (2, 4), "the run goes on"


def test_a_server_that_cannot_tell_what_an_id_is_differs_in_a_text(fake):
    fake.tokenizer, answer = byte_level_tokenizer(DEEPSEEK), fake.answer
    fake.answer = lambda path, body: (404, {"detail": "Not Found"}) if path == "/detokenize" else answer(path, body)
    with pytest.raises(UserError, match=r"1 difference, token 0 of '<\|endoftext\|><\|im_start\|>.*' is ids \[260"):
        client_of(fake).handshake(max_downtime=5.0)


def test_the_comparison_ends_after_many_differences(fake):
    fake.tokenizer = byte_level_tokenizer([f"<|{index}|>" for index in range(150)])
    probes = tokenizer_probes(byte_level_tokenizer([f"<|student {index}|>" for index in range(150)]))
    needs = TeacherRequirements(4, 256, probes, check_tokenizers="warn")
    identity = TeacherServer(fake.url, open_client(10.0, 4), needs).handshake(max_downtime=5.0)
    assert len(identity.differences) == 100 and fake.asked.count("/tokenize") < len(probes)


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_a_server_that_restarts_with_another_model_and_tokenizer_is_refused(mode, fake):
    server = client_of(fake, mode)
    server.handshake(max_downtime=5.0)
    fake.stop()
    with pytest.raises(ServerDown):
        server.score(REQUEST)
    fake.checkpoint, fake.tokenizer = tiny_checkpoint("qwen3", seed=1, vocab_size=300), byte_level_tokenizer(QWEN[:2])
    fake.start()
    error = UserError if mode == "strict" else ServiceError
    with pytest.raises(error, match=r"its tokenizer is not|serves another model than at the start of the run"):
        server.score(REQUEST)
