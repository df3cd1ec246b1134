"""Responses to a dataset's prompts: the same file under every layout, and after a kill; as rows to train on."""

from __future__ import annotations

import functools
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tokenizer
from fake_vllm import FakeVllm, transport
from layouts import DENSE
from rows import RandomRows
from safetensors.torch import load_file
from teachers.fake_server import FakeServer
from training_layouts import recipe_of
from world import World

from megatron_gkd.config.schema import RolloutSection
from megatron_gkd.data.rows import parse_row
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.training.generated_file import GeneratedFile

COUNT, N = 24, 2
EOS = range(3, 9)  # so that some responses end
ROLLOUT = {"max_completion_length": 9, "rollout_temperature": 1.3}
CHECKPOINT = functools.partial(tiny_checkpoint, "qwen3_tied", seed=2, num_hidden_layers=2)


def generator_and_formatter(recipe, mesh, rows, engine):
    from megatron_gkd.training.build import sampling_of
    from megatron_gkd.training.completion_sampler import CompletionSampler
    from megatron_gkd.training.generated_rows import ResponseGenerator, RowFormatter

    sampler = CompletionSampler(engine, sampling_of(recipe, ()), mesh.dp)
    return ResponseGenerator(recipe, rows, sampler, N), RowFormatter(recipe, rows, tiny_tokenizer(), "model")


def write(rank, world_size, checkpoint, changes, path, chunk_rows=7, count=COUNT):
    """What `megatron-gkd generate` does, from random rows."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.ends import CompletionEnds
    from megatron_gkd.training.generate import settings_of, write_responses

    recipe = recipe_of(changes)
    rollout = recipe.rollout.model_copy(update=ROLLOUT | changes.get("rollout", {}))
    recipe = recipe.model_copy(update={"rollout": rollout})
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    model = MegatronModel.load(Checkpoint.open(str(checkpoint)), mesh, BuildOptions())
    rows = RandomRows(count=count)
    file = GeneratedFile(path, chunk_rows, settings_of(recipe, "model", N, rows, CompletionEnds(())))
    try:
        write_responses(file, *generator_and_formatter(recipe, mesh, rows, MegatronEngine(model, EOS)), mesh)
    finally:
        destroy_mesh()


def test_settings_are_those_of_files_that_earlier_versions_have_begun():
    """A new name or value would keep a run from continuing such a file."""
    from megatron_gkd.training.ends import CompletionEnds
    from megatron_gkd.training.generate import settings_of

    recipe = recipe_of({})
    settings = settings_of(recipe, "model", N, RandomRows(count=COUNT), CompletionEnds((0, 2)))
    rows, prompts = settings.pop("rows"), settings.pop("prompts")
    assert json.loads(json.dumps(settings)) == {
        "model": "model",
        "n": N,
        "seed": recipe.train.seed,
        "dtype": "fp32",
        "max_length": 64,
        "max_completion_length": recipe.max_completion_length,
        "rollout_temperature": recipe.rollout_temperature,
        "top_k": None,
        "top_p": 1.0,
        "truncated": "keep",
        "stop_token_ids": [],
        "stop": [],
        "dataset": ["unused.jsonl"],
    }
    assert len(rows) == len(prompts) == 32
    added = settings_of(recipe, "model", N, RandomRows(count=COUNT), CompletionEnds((0, 2), added=(2,)))
    assert added["added_ends"] == [2], "other responses than those of earlier versions"
    changed = settings_of(
        recipe_of({"rollout": {"min_p": 0.1, "repetition_penalty": 1.2}}), "model", N, RandomRows(), CompletionEnds(())
    )
    assert (changed["min_p"], changed["repetition_penalty"]) == (0.1, 1.2)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(gloo_world, tmp_path_factory):
    path = tmp_path_factory.mktemp("generated") / "responses.jsonl"
    gloo_world(1).run(write, CHECKPOINT(), {}, path)
    return path


def test_every_prompt_has_its_responses_in_order_with_seeds_of_their_own(whole):
    rows = read(whole)
    assert [(row["row"], row["number"]) for row in rows] == [(row, number) for row in range(COUNT) for number in (0, 1)]
    data = RandomRows(count=COUNT)
    for row in rows:
        sample = data[row["row"]]
        assert row["prompt_token_ids"] == sample.input_ids[: sample.label_positions[0] + 1].tolist()
        assert 1 <= len(row["response_token_ids"]) <= 9
        assert (row["finish_reason"] == "stop") == (row["response_token_ids"][-1] in EOS)
        assert row["prompt"] == tiny_tokenizer().decode(row["prompt_token_ids"]) and row["model"] == "model"
    unlike = [a["response_token_ids"] != b["response_token_ids"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert sum(unlike) > len(unlike) / 2


@pytest.mark.parametrize("layout", ["TP2xPP2", "CP2xDP2, packed"])
def test_every_layout_writes_the_same_file(layout, gloo_world, whole, tmp_path):
    world_size, changes = DENSE[layout]
    gloo_world(world_size).run(write, CHECKPOINT(), changes, tmp_path / "responses.jsonl")
    assert (tmp_path / "responses.jsonl").read_bytes() == whole.read_bytes()


def test_rows_of_ids_become_samples_with_these_ids(whole):
    render = RowRenderer(tiny_tokenizer(), vocab_size=99)
    for row in read(whole):
        input_ids, labels, _ = render(parse_row(row))
        start = len(row["prompt_token_ids"])
        assert input_ids.tolist() == row["prompt_token_ids"] + row["response_token_ids"]
        assert labels.tolist() == [IGNORED_LABEL] * (start - 1) + row["response_token_ids"] + [IGNORED_LABEL]


@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_truncated_responses_are_masked_or_left_out(truncated, gloo_world, whole, tmp_path):
    path = tmp_path / "responses.jsonl"
    gloo_world(1).run(write, CHECKPOINT(), {"rollout": {"truncated_completions": truncated}}, path)
    kept = read(whole)
    expected = [row | ({"masked": True} if row["finish_reason"] == "length" else {}) for row in kept]
    if truncated == "drop":
        expected = [row for row in kept if row["finish_reason"] == "stop"]
    assert read(path) == expected
    assert {row["finish_reason"] for row in kept} == {"stop", "length"}


def test_a_killed_run_is_continued_to_the_same_file(whole, tmp_path):
    broken = tmp_path / "responses.jsonl"
    longer = 200  # so that it is killed in the middle
    world = World(1)
    try:
        runner = threading.Thread(target=_run_until_killed, args=(world, broken, longer))
        runner.start()
        deadline = time.monotonic() + 120
        while not broken.exists() or broken.stat().st_size < 2000:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        world.send_signal(signal.SIGKILL)
        runner.join()
        assert 0 < len(broken.read_bytes().splitlines()) < longer * N
        with open(broken, "a") as file:
            file.write('{"row": 39, "half of a li')
        world.run(write, CHECKPOINT(), {}, broken, count=longer)
        again = tmp_path / "again.jsonl"
        world.run(write, CHECKPOINT(), {}, again, count=longer)
    finally:
        world.close()
    assert broken.read_bytes() == again.read_bytes()


def _run_until_killed(world, path, count):
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        world.run(write, CHECKPOINT(), {}, path, count=count)


ALL = Sampling(max_completion_length=9)


def generate_by_servers(rank, world_size, checkpoint, folder):
    """Generate with servers that have other weights, one of which is paused; return the weights that they have then."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.generation_engine import build_generation_engine

    fakes = {"one": FakeVllm(), "two": FakeVllm()}
    fakes["one"].weights = {"model.norm.weight": torch.full((32,), 7.0)}
    fakes["two"].pause()
    urls = [f"http://{host}:1" for host in fakes]
    rollout = {"engine": "vllm_server", "vllm_server_urls": urls, "weight_sync_dir": str(folder)}
    rollout |= {"vllm_server_max_downtime_s": 0.2}
    recipe = recipe_of({}).model_copy(update={"rollout": RolloutSection(**rollout)})
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    client = httpx.Client(transport=transport(fakes))
    try:
        with mock.patch.object(httpx, "Client", return_value=client):
            models = SimpleNamespace(student=Checkpoint.open(str(checkpoint)), images=None)
            engine = build_generation_engine("student", recipe, mesh, models)
        engine.generate([[5, 6]] * 8, ALL, list(range(8)))
        engine.close()
    finally:
        destroy_mesh()
    return {host: fake.weights for host, fake in fakes.items()}


def test_servers_get_the_students_weights_before_they_generate(gloo_world, tmp_path):
    held = gloo_world(1).run(generate_by_servers, CHECKPOINT(), tmp_path)[0]
    expected = load_file(CHECKPOINT() / "model.safetensors")
    for weights in held.values():
        assert expected.items() and weights.keys() >= expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


def verify_chunks(rank, world_size, checkpoint, path, url, swapped):
    """Write chunks of responses while another server replaces the teacher's; return the error."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.ends import CompletionEnds
    from megatron_gkd.training.generate import settings_of, verify_teacher, write_responses

    recipe = recipe_of({"teacher": {"teacher_model": None, "teacher_model_server": url}})
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=ROLLOUT)})
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    try:
        verify = verify_teacher(recipe, mesh, tiny_tokenizer())
        model = MegatronModel.load(Checkpoint.open(str(checkpoint)), mesh, BuildOptions())
        rows = RandomRows(count=COUNT)
        generator, formatter = generator_and_formatter(recipe, mesh, rows, MegatronEngine(model, EOS))
        generate = generator.generate

        def generate_after_swap(rows):
            if 7 in rows:  # of the second chunk
                swapped.touch()
                while not swapped.with_suffix(".done").exists():
                    time.sleep(0.01)
            return generate(rows)

        generator.generate = generate_after_swap
        file = GeneratedFile(path, 7, settings_of(recipe, "model", N, rows, CompletionEnds(())))
        write_responses(file, generator, formatter, mesh, verify)
    except GkdError as error:
        return str(error), error.exit_code
    finally:
        destroy_mesh()


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_response_of_a_server_that_has_another_model_since_is_written(world_size, gloo_world, tmp_path):
    path, swapped = tmp_path / "responses.jsonl", tmp_path / "swapped"
    with FakeServer(CHECKPOINT()) as server, ThreadPoolExecutor(1) as pool:
        arguments = (CHECKPOINT(), path, server.url, swapped)
        call = pool.submit(gloo_world(world_size).run, verify_chunks, *arguments)
        while not swapped.exists():
            assert not call.done(), call.result()
            time.sleep(0.01)
        server.checkpoint = tiny_checkpoint("qwen3_tied", seed=3, num_hidden_layers=2)
        swapped.with_suffix(".done").touch()
        messages = call.result()
    ((message, exit_code),) = set(messages)
    assert message.startswith(f"{server.url}: serves another model than at the start") and exit_code == 69
    assert [row["row"] for row in read(path)[::N]] == list(range(7))


def test_a_teacher_server_with_another_tokenizer_is_refused_before_it_generates(gloo_world, tmp_path):
    with FakeServer(CHECKPOINT(), tiny_tokenizer(prefix="v")) as server:
        arguments = (CHECKPOINT(), tmp_path / "responses.jsonl", server.url, tmp_path / "swapped")
        ((message, exit_code),) = gloo_world(1).run(verify_chunks, *arguments)
    assert message.startswith(f"{server.url}: its tokenizer is not the student's") and exit_code == 2


class TestFile:
    def file(self, folder, chunk_rows=2, **settings):
        return GeneratedFile(folder / "x.jsonl", chunk_rows, {"n": 1} | settings)

    def rows(self, *numbers):
        return [{"row": number} for number in numbers]

    def test_the_newest_chunk_is_made_again(self, tmp_path):
        file = self.file(tmp_path)
        assert file.resume() == 0
        file.append(self.rows(0, 1))
        file.append(self.rows(2))  # its other row was dropped, or is not there yet
        assert self.file(tmp_path).resume() == 1
        assert read(file.path) == self.rows(0, 1)
        with open(file.path, "a") as text:
            text.write('{"row": 2')
        assert self.file(tmp_path).resume() == 0 and read(file.path) == []

    @pytest.mark.parametrize(
        ("options", "problem"),
        [({"n": 2}, "was begun with n = 1, not 2"), ({"chunk_rows": 3}, "was begun with chunk_rows = 2, not 3")],
    )
    def test_other_settings_are_refused(self, tmp_path, options, problem):
        self.file(tmp_path).resume()
        with pytest.raises(UserError, match=problem):
            self.file(tmp_path, **options).resume()

    def test_other_prompts_of_the_same_lengths_are_refused_where_the_file_knows_them(self, tmp_path):
        self.file(tmp_path).resume()
        self.file(tmp_path, prompts="a").resume()  # begun by an earlier version
        (tmp_path / "x.jsonl.settings.json").unlink()
        self.file(tmp_path, prompts="a").resume()
        with pytest.raises(UserError, match="was begun with prompts = a, not b"):
            self.file(tmp_path, prompts="b").resume()

    def test_a_file_of_another_origin_stays_as_it_is(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("mine\n")
        with pytest.raises(UserError, match="exists, and was not written by generate"):
            self.file(tmp_path).resume()
        assert (tmp_path / "x.jsonl").read_text() == "mine\n"
