"""The client's treatment of responses that a healthy vLLM server does not send, or not on demand."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest
import torch

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.rollout.vllm.adapters import AdapterFolder, adapter_name, load_adapters_from_folder
from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.completion_response import Sampled
from megatron_gkd.rollout.vllm.handshake import Handshake, ServerRequirements
from megatron_gkd.rollout.vllm.requests import CompletionRequest
from megatron_gkd.rollout.vllm.weight_folder import WeightFolder, load_from_folder

CHOICE = {"finish_reason": "stop", "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}}
SAMPLED = Sampled([5], [-1.0], "stop")
REQUEST = CompletionRequest("/v1/completions", {"max_tokens": 4}, max_tokens=4)


def naming(model):
    """The request, of a model of this name."""
    return replace(REQUEST, body=REQUEST.body | {"model": model})


class Scripted:
    """Respond like a vLLM server, except if `failures` has another response for the next requests to a path."""

    def __init__(self):
        self.label = "default"
        self.model, self.max_model_len, self.logprobs_mode = "tiny", 64, "raw_logprobs"
        self.dtype, self.lora_config = "torch.bfloat16", None
        self.adapters: dict[str, str] = {}
        self.calls: list[str] = []
        self.failures: dict[str, list] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls.append(path)
        if self.failures.get(path):
            failure = self.failures[path].pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        body = json.loads(request.content) if request.content else {}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
            return httpx.Response(200, text="Success")  # no JSON
        if path == "/v1/unload_lora_adapter":
            return httpx.Response(200 if self.adapters.pop(body["lora_name"], None) else 404)
        if path == "/v1/completions" and body.get("model", self.model) not in (self.model, *self.adapters):
            return httpx.Response(404, text="The model does not exist.")
        model_config = {"logprobs_mode": self.logprobs_mode, "dtype": self.dtype}
        models = [{"id": self.model, "max_model_len": self.max_model_len, "parent": None}]
        models += [{"id": name, "max_model_len": None, "parent": self.model} for name in self.adapters]
        responses = {
            "/v1/models": {"data": models},
            "/server_info": {"vllm_config": {"model_config": model_config, "lora_config": self.lora_config}},
            "/weight_info": {"weight_version": self.label},
            "/reset_prefix_cache": {"success": True},
            "/v1/completions": {"choices": [CHOICE]},
        }
        return httpx.Response(200, json=responses.get(path, {}))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("megatron_gkd.runtime.servers._FIRST_PAUSE", 1e-3)


@pytest.fixture
def scripted():
    return Scripted()


@pytest.fixture
def server(scripted):
    http = httpx.Client(transport=httpx.MockTransport(scripted))
    return StudentServer("http://server:8000/", http, 0.2, load_from_folder)


@pytest.fixture
def weights(tmp_path):
    return WeightFolder(tmp_path, {"a": (2,)}).write([("a", torch.zeros(2))], version=4)


DOWN = [
    httpx.ConnectError("refused"),
    httpx.ReadTimeout("too long"),
    httpx.RemoteProtocolError("hung up"),
    httpx.Response(503, text="starting"),
    httpx.Response(500, text="EngineCore encountered an issue"),
]


def test_the_handshake_waits_for_a_server_that_is_still_starting(server, scripted):
    scripted.failures["/v1/models"] = DOWN[:3]
    model = server.wait_until_ready(ServerRequirements(64))
    assert (model.name, model.max_model_len) == ("tiny", 64) and scripted.calls.count("/v1/models") == 4


@pytest.mark.parametrize("failure", DOWN, ids=str)
def test_past_the_limit_there_is_a_clear_error(failure, server, scripted):
    scripted.failures["/v1/models"] = [failure] * 1000
    with pytest.raises(
        ServiceError, match=r"http://server:8000/v1/models: .*for 0.2 s \(rollout.vllm_server_max_downtime_s\)"
    ):
        server.wait_until_ready(ServerRequirements(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 63}, "up to 63 tokens, fewer than data.max_length = 64; start it with --max-model-len 64"),
        ({"logprobs_mode": "processed_logprobs"}, "start it with --logprobs-mode raw_logprobs"),
        ({"failures": {"/server_info": [httpx.Response(404)]}}, "start it with VLLM_SERVER_DEV_MODE=1"),
        ({"failures": {"/weight_info": [httpx.Response(404)]}}, "its vLLM is too old"),
    ],
)
def test_a_server_that_can_not_serve_is_refused(change, message, server, scripted):
    vars(scripted).update(change)
    with pytest.raises(UserError, match=message):
        server.wait_until_ready(ServerRequirements(64))


STEPS = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume", "/update_weight_version"]


def test_new_weights_come_while_nothing_runs_and_old_keys_and_values_go(server, scripted, weights):
    server.load(weights)
    assert scripted.calls == ["/weight_info", *STEPS]
    assert scripted.label.startswith(f"{weights.label}.")
    assert server.complete(REQUEST) == (scripted.label, SAMPLED) == (server.ensure_current(), SAMPLED)


@pytest.mark.parametrize("path", STEPS)
def test_a_loading_that_is_interrupted_starts_over(path, server, scripted, weights):
    scripted.failures = {path: [httpx.ReadError("reset")], "/health": [httpx.ConnectError("refused")]}
    server.load(weights)
    assert scripted.calls[-len(STEPS) :] == STEPS and scripted.calls.count("/pause") == 2


def test_a_prefix_cache_in_use_is_reset_again(server, scripted, weights):
    scripted.failures["/reset_prefix_cache"] = [httpx.Response(200, json={"success": False})]
    server.load(weights)
    assert scripted.calls.count("/reset_prefix_cache") == 2


def test_a_server_that_is_up_but_can_not_load_is_an_error_at_once(server, scripted, weights):
    scripted.failures["/collective_rpc"] = [httpx.Response(500, text="no such file")]
    with pytest.raises(ServiceError, match=r"can't load .*\(rollout.weight_sync_dir\).*no such file"):
        server.load(weights)
    assert "/resume" not in scripted.calls


def test_bad_weights_are_never_sent(server, scripted, weights):
    for file in weights.directory.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no .*safetensors file there"):
        server.load(weights)
    assert scripted.calls == ["/weight_info"]


@pytest.mark.parametrize(
    "failure",
    [*DOWN, httpx.Response(200, json={"choices": [{"finish_reason": "abort"}]})],
    ids=lambda failure: getattr(failure, "text", None) or str(failure),
)
def test_a_failed_completion_is_requested_again(failure, server, scripted, weights):
    server.load(weights)
    scripted.failures["/v1/completions"] = [failure] * 2
    assert server.complete(REQUEST) == (scripted.label, SAMPLED)
    assert scripted.calls.count("/v1/completions") == 3 and scripted.calls.count("/collective_rpc") == 1


def test_a_restarted_server_is_given_the_weights_again_under_another_label(server, scripted, weights):
    server.load(weights)
    before = scripted.label
    scripted.label = "default"
    scripted.failures["/v1/completions"] = [httpx.ReadError("reset")]
    label, _ = server.complete(REQUEST)
    assert label == scripted.label == server.ensure_current() != before
    assert scripted.calls.count("/collective_rpc") == 2


def test_the_label_shows_that_a_server_was_restarted_before_it_responded(server, scripted, weights):
    server.load(weights)
    scripted.label = "default"
    label, _ = server.complete(REQUEST)
    assert label != server.ensure_current() and scripted.label == server.ensure_current()


def test_a_request_that_is_refused_is_an_error_at_once(server, scripted, weights):
    server.load(weights)
    scripted.failures["/v1/completions"] = [httpx.Response(400, text="Token id 999 is out of vocabulary")]
    with pytest.raises(UserError, match="400: Token id 999 is out of vocabulary"):
        server.complete(REQUEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs_mode": "processed_logprobs"}, "gives processed_logprobs; start it with --logprobs-mode raw_logpr"),
        ({"max_model_len": 63}, "up to 63 tokens, fewer than data.max_length = 64"),
        ({"model": "other"}, "serves other since it lost the student's weights, and served tiny before"),
    ],
)
def test_a_server_that_comes_back_as_another_is_refused(change, message, server, scripted, weights):
    """Its label shows that it has lost the weights, so the handshake is repeated before it gets them."""
    server.handshake = Handshake(ServerRequirements(64), server.wait_until_ready(ServerRequirements(64)))
    server.load(weights)
    scripted.label, before = "default", scripted.calls.count("/collective_rpc")
    vars(scripted).update(change)
    scripted.failures["/v1/completions"] = [httpx.ReadError("reset")]
    with pytest.raises(UserError, match=message):
        server.complete(REQUEST)
    assert scripted.calls.count("/collective_rpc") == before


def test_new_weights_alone_need_no_other_handshake(server, scripted, weights, tmp_path):
    server.handshake = Handshake(ServerRequirements(64), server.wait_until_ready(ServerRequirements(64)))
    server.load(weights)
    folder = WeightFolder(tmp_path / "next", {"a": (2,)})
    folder.run = weights.label.rpartition("-")[0]
    server.load(folder.write([("a", torch.ones(2))], version=5))
    assert scripted.calls.count("/server_info") == 1


@pytest.fixture
def adapters(tmp_path):
    """`adapters(version)`: that version of a folder's adapters."""
    folder = AdapterFolder(tmp_path, {"a": (2,)}, {"r": 8})
    return lambda version: folder.write([("a", torch.full((2,), version))], version)


@pytest.fixture
def lora_server(scripted):
    scripted.lora_config = {"max_lora_rank": 8}
    http = httpx.Client(transport=httpx.MockTransport(scripted))
    server = StudentServer("http://server:8000/", http, 0.2, load_adapters_from_folder)
    needs = ServerRequirements(64, lora_rank=8)
    server.handshake = Handshake(needs, server.wait_until_ready(needs))
    return server


def test_a_server_has_the_newest_adapters_alone_and_under_a_new_name(lora_server, scripted, adapters):
    scripted.adapters = {"of another": "elsewhere"}
    for version in (1, 2):
        weights = adapters(version)
        assert (weights.directory / "adapter_config.json").read_text() == '{\n  "r": 8\n}\n'
        lora_server.load(weights)
        assert scripted.adapters == {"of another": "elsewhere", adapter_name(weights): str(weights.directory)}
    assert lora_server.complete(naming(adapter_name(weights))) == (scripted.label, SAMPLED)


def test_a_server_that_was_started_anew_is_given_the_adapters_again(lora_server, scripted, adapters):
    weights = adapters(1)
    lora_server.load(weights)
    scripted.label, scripted.adapters = "default", {}
    assert lora_server.complete(naming(adapter_name(weights))) == (scripted.label, SAMPLED)
    assert list(scripted.adapters) == [adapter_name(weights)]


@pytest.mark.parametrize(
    ("change", "needs", "message"),
    [
        ({}, {"lora_rank": 9}, "rank 0 at most, which has to be 9; .*--enable-lora --max-lora-rank 16, and VLLM_ALLOW"),
        ({"lora_config": {"max_lora_rank": 8}}, {"lora_rank": 9}, "of rank 8 at most"),
        (
            {},
            {"needs_fp32": True},
            "computes in torch.bfloat16; with lora.merge_dtype = fp32 start it with --dtype float",
        ),
    ],
)
def test_a_server_that_can_not_take_adapters_is_refused(change, needs, message, server, scripted):
    vars(scripted).update(change)
    with pytest.raises(UserError, match=message):
        server.wait_until_ready(ServerRequirements(64, **needs))
    scripted.lora_config, scripted.dtype = {"max_lora_rank": 16}, "torch.float32"
    assert server.wait_until_ready(ServerRequirements(64, **needs)).name == "tiny"


def test_a_server_without_runtime_loading_is_refused(lora_server, scripted, adapters):
    scripted.failures["/v1/load_lora_adapter"] = [httpx.Response(404)]
    with pytest.raises(UserError, match="404: ; start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        lora_server.load(adapters(1))
