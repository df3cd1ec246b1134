"""On-policy steps: the same samples, loss and gradient under every layout, for every mix of rows."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import numpy as np
import pytest
from batching import ONE_RANK
from checkpoints import tiny_checkpoint, tiny_tokenizer
from layouts import DENSE, MOE, PP2, SP, TP2
from rows import RandomRows
from training_layouts import build, named_gradients, recipe_of

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import Completion, RolloutFailed, Sampling
from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
from megatron_gkd.training.step_prompts import StepPrompts

STEPS = 3


def models(kind):
    student = tiny_checkpoint("qwen3_tied" if kind == "dense" else "qwen3_moe", seed=2, num_hidden_layers=2)
    return student, tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)


def train_on_policy(rank, world_size, student, teacher, changes, lmbda, granularity, generations=(1, 1), rows=None):
    """Per step: totals, the rollouts' record, gradient norm; on rank 0 the gradient by Hugging Face name, and the
    completions with their divergence.

    `generations`: steps of a generation, and completions of each prompt.
    """
    from megatron_gkd.data.generation_order import GenerationOrder
    from megatron_gkd.data.loader import StepLoader
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.base import FollowsStudent
    from megatron_gkd.training.completion_recorder import CompletionRecorder

    rows = rows or RandomRows(count=24)
    mesh, student, teacher, _ = build(student, teacher, changes, rows)
    schedule = LambdaSchedule(lmbda, granularity, 7, *generations)
    order = GenerationOrder(SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True), schedule, global_batch_size=4)
    config = BatchConfig.from_recipe(recipe_of(changes), mesh, pad_token_id=0)
    prompts, batches = StepPrompts(rows, order, schedule, config), StepLoader(rows, order, config, range(1, STEPS + 1))
    options = RolloutOptions(Sampling(max_completion_length=9, temperature=1.3))
    rollouts = Rollouts(MegatronEngine(student.model, [3]), prompts, options, mesh.dp)
    completions = CompletionRecorder(mesh, tiny_tokenizer(), interval=1)
    records = []
    for step, offline in enumerate(batches, start=1):
        microbatches, report, record = offline, None, {}
        if prompts.is_on_policy(step):
            if not rollouts.has_begun(step):
                rollouts.engine.load_weights(student.model.named_tensors(), version=step - 1)
            microbatches, report = rollouts.microbatches(step)
            names = ("tokens", "student_rows", "log_prob", "staleness")
            record = {name: getattr(report, name) for name in names}
        with teacher.resident():
            signals = teacher.score(microbatches)
        totals = student.compute_gradients(microbatches, signals, force_all_reduce=True)
        gradient = named_gradients(student)
        if report is not None:
            record["completions"] = completions.of_step(step, report, microbatches, student.token_divergence)
        record |= {"totals": totals, "gradient": gradient if rank == 0 else None, "grad_norm": student.update()}
        if isinstance(teacher, FollowsStudent):
            teacher.after_update()
        records.append(record)
    destroy_mesh()
    return records


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind, *schedule):
        return gloo_world(1).run(train_on_policy, *models(kind), {}, *schedule)[0]

    return of


ALWAYS, BY_STEP, BY_ROW = (1.0, "step"), (0.5, "step"), (0.5, "row")
ONE_STEP = (1, 1)
LAYOUTS = [
    *(("dense", name) for name in ("TP2+SP", "PP2", "CP2", "DP2", "TP2xPP2", "CP2xDP2, packed")),
    *(("mixture", name) for name in ("EP2", "TP2+SPxEP2")),
]
CASES = [(*layout, *lambda_schedule) for layout in LAYOUTS for lambda_schedule in (ALWAYS, BY_ROW)]
CASES += [("dense", name, *BY_STEP) for name in ("DP2", "TP2xPP2")]
REPLICAS = {"TP2+SPxPP2xDP2": (8, {"parallel": TP2 | SP | PP2})}
"""Tensor-parallel ranks, stages and replicas at once: none may wait for one that took the other branch."""
LARGE = [("dense", name, *lambda_schedule) for name in REPLICAS for lambda_schedule in (BY_STEP, BY_ROW)]
GENERATIONS = (0.6, "row", (2, 4))
SEVERAL_STEPS = [("dense", name, *GENERATIONS) for name in ("CP2xDP2, packed", "TP2xPP2")]


@pytest.mark.parametrize(("kind", "layout", *("lmbda", "granularity", "generations")), [
    *((*case, ONE_STEP) for case in CASES + LARGE), *SEVERAL_STEPS
])  # fmt: skip
def test_every_layout_equals_one_process(kind, layout, lmbda, granularity, generations, gloo_world, one_process):
    world_size, changes = (DENSE | MOE | REPLICAS)[layout]
    ranks = gloo_world(world_size).run(train_on_policy, *models(kind), changes, lmbda, granularity, generations)
    expected = one_process(kind, lmbda, granularity, generations)
    assert {bool(record.get("student_rows")) for record in expected} == ({True} if lmbda == 1 else {True, False}) or (
        granularity == "row"
    )
    for rank in ranks:
        for a, b in zip(rank, expected, strict=True):
            for name in ("tokens", "student_rows", "staleness"):
                assert a.get(name) == b.get(name)
            for name, value in b["totals"].items():
                assert a["totals"][name] == pytest.approx(value, rel=1e-5), name
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert rank is ranks[0] or not a.get("completions")
    for a, b in zip(ranks[0], expected, strict=True):
        for name, gradient in b["gradient"].items():
            assert (a["gradient"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for mine, theirs in zip(a.get("completions", []), b.get("completions", []), strict=True):
            for key in ("divergence", "token_divergence"):
                assert mine.pop(key) == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), key
            assert mine.items() <= theirs.items()


def test_there_are_steps_of_every_kind(one_process):
    """Of the dataset alone, of the student alone, and with so few rows of the student's that a replica has none."""
    rows = {
        lambda_schedule: [r.get("student_rows", 0) for r in one_process("dense", *lambda_schedule, ONE_STEP)]
        for lambda_schedule in (BY_STEP, BY_ROW)
    }
    assert set(rows[BY_STEP]) == {0, 4} and 1 in rows[BY_ROW] and 3 in rows[BY_ROW]


def test_the_steps_of_a_generation_train_on_completions_of_the_same_weights(one_process):
    records = one_process("dense", *GENERATIONS)
    assert [record["staleness"] for record in records] == [0, 1, 0]
    versions = [{one["version"] for one in record["completions"]} for record in records]
    assert versions == [{0}, {0}, {2}]
    prompts = [[one["prompt"] for one in record["completions"]] for record in records]
    assert prompts[0] and set(prompts[0]) == set(prompts[1]), "each step has completions of each prompt"
    completions = {one["completion"] for record in records[:2] for one in record["completions"]}
    assert len(completions) > len(set(prompts[0])), "of random streams of their own"


def test_completions_have_the_divergence_of_each_token(one_process):
    for record in one_process("dense", *ALWAYS, ONE_STEP):
        completions = record["completions"]
        assert len(completions) == 4
        values = [value for completion in completions for value in completion["token_divergence"]]
        assert len(values) == record["tokens"] and sum(values) == pytest.approx(
            record["totals"]["divergence"], rel=1e-4
        )
        for completion in completions:
            assert (
                len(completion["token_divergence"]) == completion["completion_length"] == len(completion["token_ids"])
            )
            assert completion["completion"].split() == tiny_tokenizer().decode(completion["token_ids"]).split()
            assert completion["divergence"] == pytest.approx(np.mean(completion["token_divergence"]), abs=1e-5)


def test_the_engine_and_the_trainer_compute_the_same_log_probs(one_process):
    for record in one_process("dense", *ALWAYS, ONE_STEP):
        assert record["totals"]["dataset_tokens"] == 0 and record["tokens"] == record["totals"]["tokens"]
        assert -record["log_prob"] == pytest.approx(record["totals"]["student_cross_entropy"], rel=1e-5)


class RepeatingEngine:
    """An engine that repeats the prompt's last token; completions of odd seeds are truncated."""

    def __init__(self):
        self.calls, self.version = [], 0

    def resident(self):
        import contextlib

        return contextlib.nullcontext()

    def generate(self, prompts, sampling, seeds, images=None):
        self.calls.append((prompts, seeds))
        reasons = ["length" if seed % 2 else "stop" for seed in seeds]
        return [
            Completion([p[-1]] * 4, [-1.0] * 4, reason, self.version)
            for p, reason in zip(prompts, reasons, strict=True)
        ]


class SingleRank:
    """The data-parallel group of one process, for `all_gather_object` of one."""

    def rank(self):
        return 0

    def size(self):
        return 1


CONFIG = replace(ONE_RANK, max_length=64)


def build_rollouts(monkeypatch, rows=None, schedule=(1.0, "step"), config=CONFIG, dp=None, **options):
    """Return rollouts in this process; `options` are those of `RolloutOptions`, and `teacher_max_length`."""
    from megatron_gkd.data.order import SampleOrder

    monkeypatch.setattr("torch.distributed.all_gather_object", lambda into, value, group: into.__setitem__(0, value))
    rows = rows or RandomRows(count=8)
    order = SampleOrder(rows.sizes, [1.0], seed=1, shuffle=False)
    limit = options.pop("teacher_max_length", None)
    prompts = StepPrompts(rows, order, LambdaSchedule(*schedule, seed=3), config, limit)
    options = {"sampling": Sampling(max_completion_length=4)} | options
    return Rollouts(RepeatingEngine(), prompts, RolloutOptions(**options), dp or SingleRank())


def test_samples_have_the_completions_and_seeds_differ(monkeypatch):
    rollouts = build_rollouts(monkeypatch)
    microbatches, report = rollouts.microbatches(1)
    assert (report.student_rows, report.dataset_rows, report.tokens) == (8, 0, 32)
    assert len(set(rollouts.engine.calls[0][1])) == 8
    rollouts.engine.version = 1
    rollouts.microbatches(2)
    assert set(rollouts.engine.calls[0][1]).isdisjoint(rollouts.engine.calls[1][1])
    assert not any(microbatch.from_dataset.any() for microbatch in microbatches)
    assert sum(microbatch.num_labels for microbatch in microbatches) == 32
    assert report.record()["source"] == "student"


def test_steps_of_checkpoints_and_random_streams_are_counted_from_0(monkeypatch):
    """As when these checkpoints were written: otherwise a run would resume with other samples."""
    rollouts = build_rollouts(monkeypatch)
    seeds = [request.seed for request in rollouts.prompts.requests(2).values()]
    states = [np.random.SeedSequence([3, 1, position]).generate_state(1, np.uint64)[0] for position in range(8)]
    assert seeds == [int(state >> 1) for state in states]
    by_position = {str(i): asdict(Completion([i + 5], [-0.5], "stop", version=1)) for i in range(8)}
    progress = {"begun": {"1": by_position}, "probe_calls": 4}
    rollouts.restore(progress)
    assert rollouts.has_begun(2) and rollouts.progress(1) == progress
    _, report = rollouts.microbatches(2)
    assert not rollouts.engine.calls
    assert [one.completion.token_ids for one in report.sampled.values()] == [[i + 5] for i in range(8)]


@pytest.mark.parametrize(("truncated", "tokens", "empty_rows"), [("keep", 32, 0), ("mask", None, 0), ("drop", None, 1)])
def test_truncated_completions(truncated, tokens, empty_rows, monkeypatch):
    microbatches, report = build_rollouts(monkeypatch, truncated=truncated).microbatches(1)
    assert 0 < report.truncated < 8 and len(microbatches) == 8
    expected = tokens if tokens is not None else 32 - 4 * report.truncated
    assert sum(microbatch.num_labels for microbatch in microbatches) == expected == -report.log_prob
    one_token = [microbatch for microbatch in microbatches if microbatch.total_length == 1]
    assert len(one_token) == empty_rows * report.truncated


def test_rows_mix_and_keep_their_place(monkeypatch):
    rollouts = build_rollouts(monkeypatch, schedule=(0.5, "row"))
    microbatches, report = rollouts.microbatches(1)
    assert report.record()["source"] == "mixed" and report.student_rows + report.dataset_rows == 8
    assert sum(bool(microbatch.from_dataset.any()) for microbatch in microbatches) == report.dataset_rows


def test_a_completion_is_truncated_to_the_longest_sequence(monkeypatch):
    config = replace(CONFIG, max_length=10)
    rows = RandomRows(count=8, longest=20)
    microbatches, _ = build_rollouts(monkeypatch, rows, config=config).microbatches(1)
    assert max(microbatch.total_length for microbatch in microbatches) <= 10


def test_samples_of_older_weights_than_allowed_are_refused(monkeypatch):
    rollouts = build_rollouts(monkeypatch)
    with pytest.raises(RolloutFailed, match="step 3: a sample is of the student after 0 updates; allowed are 2 to 2"):
        rollouts.microbatches(3)
    rollouts = build_rollouts(monkeypatch, steps_ahead=1)
    rollouts.engine.version = 1
    assert rollouts.microbatches(3)[1].record()["staleness"] == 1


def test_an_id_that_the_teacher_lacks_is_an_error(monkeypatch):
    """Even if a server ignores which ids it may draw."""
    rollouts = build_rollouts(monkeypatch, sampling=Sampling(max_completion_length=4, vocab_size=20))
    with pytest.raises(RolloutFailed, match=r"drew the token id \d\d; student and teacher share 0 to 19"):
        rollouts.microbatches(1)


def test_only_on_policy_steps_of_the_run_are_sampled_early(monkeypatch):
    rollouts = build_rollouts(monkeypatch, schedule=(0.5, "step"))
    assert not any(rollouts.is_early(step) for step in range(1, 21))
    rollouts = build_rollouts(monkeypatch, schedule=(0.5, "step"), steps_ahead=1, num_steps=20)
    is_on_policy = rollouts.prompts.is_on_policy
    assert [rollouts.is_early(step) for step in range(1, 21)] == [is_on_policy(step) for step in range(1, 21)]
    assert any(map(is_on_policy, range(21, 41))) and not any(map(rollouts.is_early, range(21, 41)))


def test_a_completion_is_truncated_to_the_teachers_sequence(monkeypatch):
    config = replace(CONFIG, max_length=24)
    rows = RandomRows(count=8, longest=15)
    rows.teacher_prompts = [np.arange(4, 4 + 17)] * 4 + [None] * 4
    rollouts = build_rollouts(monkeypatch, rows, config=config, teacher_max_length=20)
    samples = [sample for microbatch in rollouts.microbatches(1)[0] for sample in microbatch.samples]
    lengths = {sample.row_id: int((sample.labels != -100).sum()) for sample in samples}
    assert lengths == {row: 3 if row < 4 else 4 for row in range(8)}
    rollouts = build_rollouts(monkeypatch, rows, config=config, teacher_max_length=17)
    with pytest.raises(UserError, match=r"teacher_max_length = 17: the teacher_prompt of row 0 .* 17 tokens, which"):
        rollouts.microbatches(2)


def test_a_prompt_that_leaves_no_room_is_an_error(monkeypatch):
    config = replace(CONFIG, max_length=5)
    rows = RandomRows(count=8, longest=40)
    with pytest.raises(
        UserError, match=r"^data.max_length = 5: the prompt of row . of .* leaves no room for a completion"
    ):
        build_rollouts(monkeypatch, rows, config=config).microbatches(1)


def test_a_dataset_row_without_a_response_is_an_error(monkeypatch):
    rows = RandomRows(count=8)
    rows.num_labels = np.zeros(8, dtype=np.int64)
    with pytest.raises(UserError, match="dataset has no response, and in this step the student does not respond to it"):
        build_rollouts(monkeypatch, rows, schedule=(0.5, "row")).microbatches(1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_row_that_only_one_replica_samples_is_refused_by_all_before_any_sample(rank, monkeypatch):
    """Else the other replicas wait for its samples."""

    class Replica:
        def rank(self):
            return rank

        def size(self):
            return 2

    rows = RandomRows(count=8)
    rows.teacher_prompts[3] = np.arange(70)
    rollouts = build_rollouts(monkeypatch, rows, dp=Replica())
    with pytest.raises(UserError, match=r"data.teacher_max_length = 64: the teacher_prompt of row 3 of the dataset"):
        rollouts.microbatches(1)
    rows.teacher_prompts[3] = None
    rollouts = build_rollouts(monkeypatch, rows, schedule=(0.5, "row"), dp=Replica())
    rows.num_labels = np.zeros(8, dtype=np.int64)
    with pytest.raises(UserError, match="in this step the student does not respond to it"):
        rollouts.microbatches(1)
    assert not rollouts.engine.calls
