"""An API key that one node lacks ends the run in all ranks, and the one that there is goes with every request."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from checkpoints import tiny_tokenizer
from teachers.contract import CHECKPOINT
from teachers.fake_server import FakeServer

VARIABLE = "KEY_OF_TEACHER"


def open_teacher(rank, world_size, url, ranks_with_key):
    """Return the message and the exit code of the failure, if there is one."""
    from megatron_gkd.config.api_keys import ApiKeyVariable
    from megatron_gkd.errors import GkdError
    from megatron_gkd.teachers.server.teacher import ServerTeacher, TeacherServerOptions

    if rank in ranks_with_key:
        os.environ[VARIABLE] = "sk-secret"
    mesh = SimpleNamespace(is_leader=False, is_main=rank == 0)
    key = ApiKeyVariable("teacher.teacher_server_api_key_env", VARIABLE)
    try:
        ServerTeacher(mesh, tiny_tokenizer(), 99, TeacherServerOptions((url,), k=4, max_length=64, api_key=key))
    except GkdError as error:
        return str(error), error.exit_code
    finally:
        os.environ.pop(VARIABLE, None)


@pytest.mark.parametrize("ranks_with_key", [(), (0,), (1,)])
def test_a_node_without_the_key_ends_the_run_in_all_ranks(ranks_with_key, gloo_world):
    first, second = gloo_world(2).run(open_teacher, "http://127.0.0.1:1", ranks_with_key)
    assert first == second
    message, code = first
    assert message.startswith(f"teacher.teacher_server_api_key_env = {VARIABLE}: this environment variable is not set")
    assert code == 2 and "secret" not in message


def test_the_handshake_carries_the_key(gloo_world):
    with FakeServer(CHECKPOINT()) as fake:
        fake.api_key = "sk-secret"
        assert gloo_world(2).run(open_teacher, fake.url, (0, 1)) == [None, None]
        fake.api_key = "sk-other"
        (message, code), _ = gloo_world(2).run(open_teacher, fake.url, (0, 1))
    assert message.startswith(f"{fake.url}/v1/models: 401: ") and code == 2
    assert message.endswith("the environment variable that teacher.teacher_server_api_key_env names: correct it")
    assert "secret" not in message
