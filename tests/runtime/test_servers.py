"""Responses with status 200 that are not a vLLM server's give one line each, in both clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from megatron_gkd.errors import GkdError
from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.handshake import ServerRequirements
from megatron_gkd.rollout.vllm.requests import CompletionRequest
from megatron_gkd.rollout.vllm.weight_folder import WeightFolder, load_from_folder
from megatron_gkd.rollout.vllm.weight_transfer import WeightTransfer
from megatron_gkd.runtime.servers import exchange
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer
from megatron_gkd.teachers.server.response import ScoreRequest
from megatron_gkd.teachers.server.tokenizer import Probe

URL = "http://server:8000"
PROBE = Probe("w5 w6 w7", [5, 6, 7], ["w5", "w6", "w7"], [b"w5", b"w6", b"w7"])


class Vllm:
    """Answers as vLLM does, except to `path`, where `content` is sent."""

    def __init__(self):
        self.path: str | None = None
        self.content, self.headers = b"", {}
        self.label = "default"

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, body = request.url.path, json.loads(request.content or b"{}")
        if path == self.path:
            return httpx.Response(200, stream=httpx.ByteStream(self.content), headers=self.headers)
        if path == "/update_weight_version":
            self.label = body["new_version"]
        answers = {
            "/v1/models": {"data": [{"id": "tiny", "max_model_len": 64}]},
            "/is_paused": {"is_paused": False},
            "/tokenize": {"tokens": PROBE.ids, "token_strs": PROBE.names},
            "/server_info": {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}},
            "/weight_info": {"weight_version": self.label},
            "/reset_prefix_cache": {"success": True},
            "/get_world_size": {"world_size": 1},
            "/v1/completions": completion_of(body),
        }
        return httpx.Response(200, json=answers.get(path, {}))


def completion_of(body: dict[str, Any]) -> dict[str, Any]:
    entries = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in body.get("prompt", [])[1:])]
    scores = {"prompt_token_ids": body.get("prompt"), "prompt_logprobs": entries}
    sampled = {"finish_reason": "stop", "token_ids": [5, 2], "logprobs": {"token_logprobs": [-1.0, -0.5]}}
    return {"choices": [scores | sampled]}


REQUEST = CompletionRequest("/v1/completions", {"prompt": [5, 6], "max_tokens": 4}, max_tokens=4)


def use_student(http: httpx.Client, folder) -> None:
    server = StudentServer(URL, http, 0.0, load_from_folder)
    server.wait_until_ready(ServerRequirements(64))
    server.load(WeightFolder(folder, {"a": (2,)}).write([("a", torch.zeros(2))], version=4))
    server.complete(REQUEST)


def use_student_of_transfer(http: httpx.Client, folder) -> None:
    transfer = WeightTransfer("gloo", {"a": (2,)}, (), 1.0)
    transfer.load([("a", torch.zeros(2))], 1, [StudentServer(URL, http, 0.0, transfer.send_to)])


def use_teacher(http: httpx.Client, folder) -> None:
    server = TeacherServer(URL, http, TeacherRequirements(1, 63, [PROBE]))
    server.handshake(max_downtime=0.0)
    server.score(ScoreRequest(np.array([5, 6, 7]), np.array([0, 1])))


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


def failure_of(use: Callable, vllm: Vllm, folder) -> str:
    with httpx.Client(transport=httpx.MockTransport(vllm)) as http, pytest.raises(GkdError) as error:
        use(http, folder)
    return str(error.value)


GARBAGE = {
    "a page": b"<!DOCTYPE html>\n<html>\n<body>Log in</body>\n</html>\n",
    "text": b"OK",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a string": b'"ok"',
    "true": b"true",
    "cut off": b'{"choices": [{"finish_reason": "st',
    "two documents": b"{}{}",
    "no UTF-8": b"\xff\xfe\x00{\x00}",
    "no UTF-8 in a string": b'{"x": "\xff"}',
    "another encoding": '{"data": []}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "NaN": b'{"x": NaN}',
    "a number too large": b'{"x": 1e999}',
    "nested a million times": b"[" * 10**6,
    "nested objects": b'{"x":' * 10**5,
}
NOT_A_COMMANDS = {"nothing": b"", "an empty object": b"{}", "an error": b'{"error": {"message": "no", "code": 400}}'}
"""Responses that are also valid for a route without a result."""
ROUTES = {
    use_student: ["/v1/models", "/server_info", "/weight_info", "/reset_prefix_cache", "/v1/completions"],
    use_student_of_transfer: ["/get_world_size"],
    use_teacher: ["/v1/models", "/is_paused", "/tokenize", "/v1/completions"],
}
COMMANDS = ["/pause", "/collective_rpc", "/resume", "/update_weight_version"]
CASES = [
    *((use, path, name) for use, paths in ROUTES.items() for path in paths for name in GARBAGE | NOT_A_COMMANDS),
    *((use_student, path, name) for path in COMMANDS for name in GARBAGE),
]


@pytest.mark.parametrize(("use", "path", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_a_response_that_is_not_of_vllm_is_one_line(use, path, name, vllm, tmp_path):
    vllm.path, vllm.content = path, (GARBAGE | NOT_A_COMMANDS)[name]
    message = failure_of(use, vllm, tmp_path)
    assert message.startswith(f"{URL}{path}: the response is not that of a vLLM server (") and "\n" not in message
    assert "; expected the JSON of" in message and len(message) < 3000


@pytest.mark.parametrize("use", [use_student, use_teacher])
def test_content_that_cannot_be_decompressed_is_one_line(use, vllm, tmp_path):
    vllm.path, vllm.content, vllm.headers = "/v1/models", b"no gzip", {"Content-Encoding": "gzip"}
    message = failure_of(use, vllm, tmp_path)
    assert message.startswith(f"{URL}/v1/models: DecodingError: ") and "\n" not in message


@pytest.mark.parametrize("status", [301, 418])
def test_a_refusal_is_one_line(status):
    page = "<html>\n<h1>elsewhere</h1>\n</html>"
    http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(status, text=page)))
    with pytest.raises(GkdError) as error:
        exchange(http, "GET", f"{URL}/v1/models")
    assert str(error.value) == f"{URL}/v1/models: {status}: <html> <h1>elsewhere</h1> </html>"


BOTH = [use_student, use_teacher]
COMPLETIONS = [
    (BOTH, ("choices", []), "not that of a vLLM server"),
    (BOTH, ("choices", None), "not that of a vLLM server"),
    (BOTH, ("choices", {}), "not that of a vLLM server"),
    (BOTH, ("choices", 0, None), "not that of a vLLM server"),
    (BOTH, ("choices", 0, []), "not that of a vLLM server"),
    (BOTH, ("choices", 0, {}), "not that of a vLLM server"),
    (BOTH, ("choices", 0, "text"), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "finish_reason", 1), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "token_ids", None), "its token_ids are None; expected are the ids"),
    ([use_student], ("choices", 0, "token_ids", []), "its token_ids are []; expected are the ids"),
    ([use_student], ("choices", 0, "token_ids", "5 2"), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "token_ids", [5, "2"]), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "token_ids", [5, 2.5]), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "token_ids", [5, None]), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "token_ids", [5, -1]), "its token_ids hold -1; expected are ids from 0"),
    ([use_student], ("choices", 0, "token_ids", [5] * 5), "it has 5 tokens; expected are at most max_tokens = 4"),
    ([use_student], ("choices", 0, "logprobs", None), "it has no token_logprobs; expected are 2"),
    ([use_student], ("choices", 0, "logprobs", []), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "logprobs", {}), "not that of a vLLM server"),
    ([use_student], ("choices", 0, "logprobs", "token_logprobs", [-1.0]), "it has 1 token_logprobs; expected are 2"),
    ([use_student], ("choices", 0, "logprobs", "token_logprobs", [-1.0, None]), "not all numbers up to 0"),
    ([use_student], ("choices", 0, "logprobs", "token_logprobs", [-1.0, 3.5]), "--logprobs-mode raw_logprobs"),
    ([use_student], ("choices", 0, "logprobs", "token_logprobs", [-1.0, "x"]), "not that of a vLLM server"),
    ([use_teacher], ("choices", 0, "prompt_logprobs", None), "not that of a vLLM server"),
    ([use_teacher], ("choices", 0, "prompt_logprobs", []), "has 0 positions; the request has 3"),
    ([use_teacher], ("choices", 0, "prompt_logprobs", [None, 1, 2]), "no log-probabilities at position 0"),
    ([use_teacher], ("choices", 0, "prompt_logprobs", [None, [], {}]), "no log-probabilities at position 0"),
    ([use_teacher], ("choices", 0, "prompt_token_ids", None), "not that of a vLLM server"),
    ([use_teacher], ("choices", 0, "prompt_token_ids", [1, 2, 3]), "other token ids than the request"),
]


@pytest.mark.parametrize(
    ("use", "change", "problem"),
    [(use, *case) for users, *case in COMPLETIONS for use in users],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_completion_of_wrong_content_is_one_line(use, change, problem, vllm, tmp_path):
    prompt = {"prompt": [5, 6, 7]} if use is use_teacher else {}
    answer: Any = completion_of(prompt)
    *path, key, value = change
    place = answer
    for part in path:
        place = place[part]
    place[key] = value
    vllm.path, vllm.content = "/v1/completions", json.dumps(answer).encode()
    message = failure_of(use, vllm, tmp_path)
    assert message.startswith(f"{URL}/v1/completions: ") and problem in message and "\n" not in message


def test_the_responses_of_vllm_are_accepted(vllm, tmp_path):
    for use in (use_student, use_teacher):
        with httpx.Client(transport=httpx.MockTransport(vllm)) as http:
            use(http, tmp_path)


FIRST_RESPONSES = """
import sys
import threading
from typing import Annotated

import msgspec

from megatron_gkd.runtime.servers import decode

sys.setswitchinterval(1e-6)


def use(kind, together):
    together.wait()
    assert decode(b'{"data": [{"id": "one"}]}', kind, "url").data[0].id == "one"


for _ in range(300):
    card = msgspec.defstruct("Card", [("id", str), ("length", int | None, None), ("parent", str | None, None)])
    kind = msgspec.defstruct("Models", [("data", Annotated[list[card], msgspec.Meta(min_length=1)])])
    together = threading.Barrier(4)
    threads = [threading.Thread(target=use, args=(kind, together)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("done")
"""


def test_the_first_responses_of_several_servers_may_come_at_once():
    """In a process of its own: msgspec 0.22.0 ends it when threads build the decoders of a kind together."""
    run = subprocess.run([sys.executable, "-c", FIRST_RESPONSES], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "done"), run.stderr
