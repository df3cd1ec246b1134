"""The teacher behind servers, over a fake one: the contract, what is begun ahead, and faults while it scores."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from checkpoints import tiny_checkpoint
from layouts import DENSE
from teachers.contract import (
    CHECKPOINT,
    LAYOUTS,
    TeacherContract,
    assert_close,
    in_every_rank,
    mesh_of,
    read_signal,
    sample,
    score_microbatches,
)
from teachers.fake_server import FakeServer
from training_layouts import build

from megatron_gkd.teachers.base import TeacherFailed


@pytest.fixture(scope="module")
def fake_server() -> Iterator[FakeServer]:
    with FakeServer(CHECKPOINT()) as server:
        yield server


def teacher_of(mesh, urls, **options):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.teachers.server.teacher import ServerTeacher, TeacherServerOptions

    options = TeacherServerOptions(tuple(urls), **{"k": 8, "max_length": 64, "max_downtime": 30.0} | options)
    return ServerTeacher(mesh, Checkpoint.open(str(CHECKPOINT())).tokenizer(), 99, options)


def results_of(rank, world_size, layout, urls):
    with mesh_of(layout) as mesh:
        return score_microbatches(teacher_of(mesh, urls), mesh)


class TestServerTeacher(TeacherContract):
    """By two addresses of the server, as if there were two."""

    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def results(cls, request, gloo_world, fake_server):
        urls = [fake_server.url, fake_server.url.replace("127.0.0.1", "localhost")]
        return in_every_rank(gloo_world, request.param, results_of, urls)


def samples_of(seeds: range) -> list:
    return [sample(14, slice(6, None), seed=seed) for seed in seeds]


def microbatch_of(samples, mesh):
    from megatron_gkd.data.microbatch import collate, shard_context_parallel

    whole = collate(samples, pad_multiple=mesh.layout.pad_multiple, pad_token_id=0)
    return shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size())


def score_after_another_replica_has_begun(rank, world_size, urls):
    """Replica 0 begins all samples, as if it had sampled them; each scores its half. Ids of the signals."""
    samples = samples_of(range(6))
    with mesh_of({}) as mesh:
        teacher = teacher_of(mesh, urls)
        if rank == 0:
            teacher.begin(samples)
        teacher.score([microbatch_of([sample(4, seed=0)], mesh)])  # of nothing, which leaves what has begun alone
        microbatches = [microbatch_of([one], mesh) for one in samples[rank::2]]
        signals = teacher.score(microbatches)
        assert teacher.dispatcher.pending() == {}
        assert [entries.ids.tolist() for entries in teacher.score(microbatches)] == [
            entries.ids.tolist() for entries in signals
        ]
        return [read_signal(signal, one, mesh) for signal, one in zip(signals, microbatches, strict=True)]


def test_replicas_exchange_the_responses_of_pending_requests(gloo_world, fake_server):
    before = fake_server.completions
    ranks = gloo_world(2).run(score_after_another_replica_has_begun, [fake_server.url])
    assert fake_server.completions - before == 1 + 6 + 6  # the known prompt, what was begun, and the second time
    for rank, signals in enumerate(ranks):
        for one, (entries,) in zip(samples_of(range(6))[rank::2], signals, strict=True):
            assert_close(entries, TeacherContract.log_probs(one)[entries.numbers])


def fail_to_make(rank, world_size, urls, options):
    with mesh_of({"parallel": {"tensor_model_parallel_size": 2}}) as mesh:
        try:
            return teacher_of(mesh, urls, **options)
        except TeacherFailed as error:
            return str(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 65}, "start it with --max-logprobs 65"),
        ({"max_length": 257}, "start it with --max-model-len 258"),
        ({"max_downtime": 0.2, "urls": ["http://127.0.0.1:1"]}, "http://127.0.0.1:1/v1/models: ConnectError"),
    ],
)
def test_all_ranks_raise_the_error_of_an_unusable_server(options, message, gloo_world, fake_server):
    urls = options.get("urls", [fake_server.url])
    messages = gloo_world(2).run(fail_to_make, urls, {key: value for key, value in options.items() if key != "urls"})
    assert messages[0] == messages[1] and message in messages[0]


def score_many(rank, world_size, urls, layout, started, options):
    """The ids and values of a replica's signals, or the error."""
    with mesh_of(layout) as mesh:
        teacher = teacher_of(mesh, urls, concurrency=4, **options)
        teacher.score([microbatch_of(samples_of(range(1)), mesh)])
        started.touch()
        microbatches = [microbatch_of([one], mesh) for one in samples_of(range(40))]
        try:
            with teacher.resident():
                return [
                    read_signal(entries, one, mesh)
                    for entries, one in zip(teacher.score(microbatches), microbatches, strict=True)
                ]
        except TeacherFailed as error:
            return str(error)


def score_while(change, server, gloo_world, folder, layout="TP2xPP2", **options):
    """What every rank has, where `change()` is made once some of the results are there."""
    world_size, parallel = DENSE[layout]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(gloo_world(world_size).run, score_many, [server.url], parallel, folder / "started", options)
        while not (folder / "started").exists():
            assert not call.done(), call.result()
            time.sleep(0.01)
        first = server.completions
        while server.completions < first + 10:
            assert not call.done(), call.result()
            time.sleep(0.001)
        change()
        return call.result()


def test_a_server_that_is_down_for_a_while_loses_no_request(gloo_world, tmp_path):
    with FakeServer(CHECKPOINT()) as server:
        server.delays = [0.05] * 60

        def restart():
            server.stop()
            time.sleep(1.5)
            server.start()

        ranks = score_while(restart, server, gloo_world, tmp_path)
    for signals in ranks[2:]:  # the last stage
        for one, (entries,) in zip(samples_of(range(40)), signals, strict=True):
            assert_close(entries, TeacherContract.log_probs(one)[entries.numbers])


OTHER = functools.partial(tiny_checkpoint, "qwen3", seed=1, head_dim=32)


def test_another_model_that_comes_back_under_the_same_name_ends_the_run_on_all_ranks(gloo_world, tmp_path):
    with FakeServer(CHECKPOINT()) as server:
        server.delays = [0.05] * 60

        def swap():
            server.stop()
            server.checkpoint = OTHER()
            server.start()

        messages = score_while(swap, server, gloo_world, tmp_path)
    assert len(set(messages)) == 1 and isinstance(messages[0], str)
    assert messages[0].startswith(f"{server.url}: serves another model than at the start of the run (as teacher)")


def score_step_by_step(rank, world_size, urls, check_interval, swapped):
    """How many scorings there were until another model was noticed, and the message; the first two are its own."""
    with mesh_of({}) as mesh:
        teacher = teacher_of(mesh, urls, check_interval=check_interval)
        for scorings in range(1, 8):
            if scorings == 3:
                dist.barrier()
                swapped.touch()
                wait_until(swapped.with_suffix(".done").exists)
            try:
                teacher.score([microbatch_of(samples_of(range(1)), mesh)])
            except TeacherFailed as error:
                return scorings, str(error)
    return None, ""


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("check_interval", "noticed"), [(1, 3), (4, 4)])
def test_the_next_check_finds_another_model_without_a_lost_connection(check_interval, noticed, gloo_world, tmp_path):
    """In both replicas, though one of them checks the server that was swapped."""
    with FakeServer(CHECKPOINT()) as same, FakeServer(CHECKPOINT()) as server, ThreadPoolExecutor(1) as pool:
        arguments = ([same.url, server.url], check_interval, tmp_path / "swapped")
        call = pool.submit(gloo_world(2).run, score_step_by_step, *arguments)
        wait_until(lambda: (tmp_path / "swapped").exists() or call.done())
        server.checkpoint = OTHER()
        (tmp_path / "swapped.done").touch()
        (first, message), second = call.result()
    assert second == (first, message) and first == noticed
    assert message.startswith(f"{server.url}: serves another model") and same.url not in message
    assert ("; 4 steps at most were scored since the last check" in message) == (check_interval == 4)


def garbage(response):
    return b"<html>no such page</html>"


def fewer_positions(response):
    del response["choices"][0]["prompt_logprobs"][-2:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (garbage, "/v1/completions: the response is not that of a vLLM server"),
        (fewer_positions, "/v1/completions: the response has 12 positions; the request has 14"),
        (None, "all attempts failed for 0.5 s (teacher.teacher_server_max_downtime_s)"),
    ],
)
def test_all_ranks_stop_together_when_a_server_fails_for_good(spoil, message, gloo_world, tmp_path):
    """It results something else, or (None) not at all."""
    with FakeServer(CHECKPOINT()) as server:
        server.delays = [0.05] * 60

        def change():
            if spoil is None:
                server.stop()
            else:
                server.spoil = spoil

        messages = score_while(change, server, gloo_world, tmp_path, max_downtime=0.5)
    assert len(set(messages)) == 1 and message in messages[0] and server.url in messages[0]


def drop_tokens(rank, world_size, student, url):
    """The totals of a step, and its signals' rows."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    server = {"teacher_model": None, "teacher_model_server": url}
    changes = {"teacher": server, "distill": {"gkd_logits_topk": 8, "temperature": 1, "gkd_topk_tail": "bucket"}}
    _, student, teacher, batches = build(student, None, changes)
    microbatches = next(iter(batches))
    totals = student.compute_gradients(microbatches, teacher.score(microbatches))
    destroy_mesh()
    return totals, sum(one.num_labels for one in microbatches)


def test_positions_without_a_probable_token_are_dropped_and_counted(gloo_world):
    def spoil(response):
        for entry in response["choices"][0]["prompt_logprobs"][-1].values():
            entry["logprob"] = -9999.0

    with FakeServer(CHECKPOINT()) as server:
        server.spoil = spoil
        totals, labels = gloo_world(1).run(drop_tokens, CHECKPOINT(), server.url)[0]
    assert totals["dropped_tokens"] == 4  # one of each row
    assert totals["tokens"] == labels - 4 and math.isfinite(totals["loss"])
    assert totals["divergence"] / totals["tokens"] < 1e-4  # of the others: the student is the teacher
