"""The engine over a real vLLM server: the contract, new weights, layouts, and a server that dies under it."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import vllm_server
from ports import free_port
from rollout.contract import (
    CHECKPOINT,
    DRAWN,
    GREEDY,
    REQUESTS,
    Request,
    RolloutEngineContract,
    run_requests,
    tokens_of,
    transformers_greedy,
)
from rollout.new_weights import OTHER, assert_follows, error_of, generate, samples, weights_of

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import RolloutFailed

pytestmark = pytest.mark.vllm
MANY = Request.of([20] * 48, replace(DRAWN, max_completion_length=200, ignore_eos=True))
"""Seconds of work."""


@contextlib.contextmanager
def engine_of(urls, folder, layout=None, weight_sync="folder", **options):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.vllm.server import VllmServerEngine
    from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**(layout or {})), seed=1)
    try:
        options = {"max_downtime": 120} | options
        options = RolloutServerOptions(tuple(urls), folder, max_length=256, weight_sync=weight_sync, **options)
        with contextlib.closing(VllmServerEngine(mesh, Checkpoint.open(str(CHECKPOINT())), options)) as engine:
            yield engine
    finally:
        destroy_mesh()


def results_of(rank, world_size, url, folder, weight_sync):
    with engine_of([url], folder, weight_sync=weight_sync) as engine:
        return run_requests(engine, weights_of(CHECKPOINT()))


WEIGHT_SYNCS = ["folder", vllm_server.TRANSFER_BACKEND]


class TestVllmServerEngine(RolloutEngineContract):
    """The server's own weights are others: every completion must be by those that the engine has sent."""

    @pytest.fixture(scope="class", params=WEIGHT_SYNCS)
    @classmethod
    def results(cls, request, vllm_process, gloo_world, tmp_path_factory):
        vllm_process.ensure_running()
        folder = tmp_path_factory.mktemp("sync")
        return gloo_world(1).run(results_of, vllm_process.url, folder, request.param)[0]


def load_one_after_another(rank, world_size, url, folder, checkpoints, weight_sync="folder", reset=True):
    from megatron_gkd.runtime import servers

    exchange = servers.exchange
    if not reset:  # pausing would do it, too
        servers.exchange = lambda http, method, url, **options: (
            b'{"success": true}'
            if url.endswith(("/pause", "/reset_prefix_cache"))
            else exchange(http, method, url, **options)
        )
    found = []
    try:
        with engine_of([url], folder, weight_sync=weight_sync) as engine:
            for version, checkpoint in enumerate(checkpoints):
                engine.load_weights(weights_of(checkpoint), version)
                found.append(samples(engine))
                assert len(list(folder.iterdir())) == (weight_sync == "folder"), "old versions are gone"
    finally:
        servers.exchange = exchange
    return found


@pytest.mark.parametrize("weight_sync", WEIGHT_SYNCS)
def test_new_weights_and_the_old_ones_again(weight_sync, student_server, gloo_world, tmp_path):
    a, b = CHECKPOINT(), OTHER()
    arguments = (student_server.url, tmp_path, [a, b, a], weight_sync)
    assert_follows(gloo_world(1).run(load_one_after_another, *arguments)[0])


def test_without_a_reset_the_prefix_cache_would_be_stale(student_server, gloo_world, tmp_path):
    """That is, the test above would notice."""
    a, b = CHECKPOINT(), OTHER()
    _, second = gloo_world(1).run(load_one_after_another, student_server.url, tmp_path, [a, b], reset=False)[0]
    assert error_of(second[1][0], b) > 1e-3


def send_a_bad_path(rank, world_size, url, folder):
    with engine_of([url], folder) as engine:
        engine.load_weights(weights_of(CHECKPOINT()), version=1)
        (server,), weights = engine.servers, engine.weights
        (weights.directory / "model-00001.safetensors").rename(folder / "elsewhere")
        server.label = None  # so that it loads its weights again
        with pytest.raises(UserError, match=r"no .*safetensors file there"):
            server.load(replace(weights, label="other"))
        (folder / "elsewhere").rename(weights.directory / "model-00001.safetensors")
        server.wanted = weights
        return generate(engine, REQUESTS["greedy"])


def test_a_bad_path_is_refused_before_it_is_sent(student_server, gloo_world, tmp_path):
    completions = gloo_world(1).run(send_a_bad_path, student_server.url, tmp_path)[0]
    assert tokens_of(completions) == transformers_greedy(CHECKPOINT(), REQUESTS["greedy"].prompts, 16)


def sample_a_sharded_student(rank, world_size, urls, folder, layout, requests):
    """Return whether this rank sent requests, and its completions; each data-parallel replica has its own request."""
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel

    with engine_of(urls, folder, layout) as engine:
        model = MegatronModel.load(engine.checkpoint, engine.mesh, BuildOptions())
        engine.load_weights(model.named_tensors(), version=3)
        return engine.mesh.is_leader, generate(engine, requests[engine.mesh.dp.rank()])


LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "DP2": {},
    "TP2xPP2": {"tensor": 2, "pipeline": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_of_a_replica_sends_requests_and_all_get_the_completions(layout, student_server, gloo_world, tmp_path):
    """By two addresses of the server, as if there were two."""
    urls = [student_server.url, student_server.url.replace("127.0.0.1", "localhost")]
    world_size = 4 if layout == "TP2xPP2" else 2
    requests = [REQUESTS["greedy"], Request.of([3], GREEDY) if layout == "DP2" else None]
    ranks = gloo_world(world_size).run(sample_a_sharded_student, urls, tmp_path, LAYOUTS[layout], requests)
    leaders = {"DP2": {0, 1}, "PP2": {1}, "TP2xPP2": {2}}.get(layout, {0})
    for rank, (is_leader, completions) in enumerate(ranks):
        request = requests[rank if layout == "DP2" else 0]
        assert is_leader == (rank in leaders)
        assert tokens_of(completions) == transformers_greedy(CHECKPOINT(), request.prompts, 16)
        assert {completion.version for completion in completions} == {3}


def fail_to_reach(rank, world_size, url, folder):
    try:
        with engine_of([url], folder, {"tensor": 2}, max_downtime=1.0):
            return None
    except RolloutFailed as error:
        return str(error)


def test_a_missing_server_is_an_error_on_all_ranks(gloo_world, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    messages = gloo_world(2).run(fail_to_reach, url, tmp_path)
    assert messages[0] == messages[1]
    assert (
        f"{url}/v1/models: ConnectError" in messages[0]
        and "for 1 s (rollout.vllm_server_max_downtime_s)" in messages[0]
    )


def generate_while_it_dies(rank, world_size, url, folder, max_downtime, weight_sync):
    """Completions before; and those during which the server dies, or the error."""
    with engine_of([url], folder, max_downtime=max_downtime, weight_sync=weight_sync) as engine:
        engine.load_weights(weights_of(CHECKPOINT()), version=2)
        before = generate(engine, MANY)
        (folder / "second time").touch()
        try:
            return before, generate(engine, MANY)
        except RolloutFailed as error:
            return before, str(error)


def kill_while_it_generates(server, gloo_world, folder, max_downtime, *, restart, weight_sync="folder"):
    """Return also the seconds from the kill until there was a completion or an error."""
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(gloo_world(1).run, generate_while_it_dies, server.url, folder, max_downtime, weight_sync)
        while not (folder / "second time").exists():
            assert not call.done(), call.result()
            time.sleep(0.05)
        time.sleep(1)  # some prompts are completed, some are not
        killed = time.monotonic()
        server.kill()
        if restart:
            server.start()
        (result,) = call.result()
        return *result, time.monotonic() - killed


def test_a_server_that_is_killed_and_restarted_loses_nothing(student_server, gloo_world, tmp_path):
    """It comes back with the weights that it was started with, and gets the student's again."""
    options = {"restart": True, "weight_sync": vllm_server.TRANSFER_BACKEND}
    before, after, _ = kill_while_it_generates(student_server, gloo_world, tmp_path, 240.0, **options)
    assert tokens_of(after) == tokens_of(before)
    assert {completion.version for completion in after} == {2}


def test_a_server_that_is_not_restarted_is_a_clear_error(student_server, gloo_world, tmp_path):
    _, message, seconds = kill_while_it_generates(student_server, gloo_world, tmp_path, 3.0, restart=False)
    assert isinstance(message, str) and f"{student_server.url}/" in message
    assert "for 3 s (rollout.vllm_server_max_downtime_s)" in message and "start it again, and then the run" in message
    assert seconds < 30
