"""The benchmark at sizes that take no time: contestants agree with the oracle, and its results can be read back."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from benchmarks import contestants, divergence, head, kernels, loss
from benchmarks.cases import BETAS, Case, full_grid
from benchmarks.measure import OURS, Work, compete
from benchmarks.memory import PeakMemory
from benchmarks.peers import Unavailable
from benchmarks.timing import Plan, Stopwatch, in_turn

CPU = torch.device("cpu")
PLAN = Plan(repeats=3, least=2, seconds=0.0)
CASE = Case(tokens=12, vocab=96, dtype="fp32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No large buffers, and no compiler: its contestant is the eager one here. No process group stays behind."""
    monkeypatch.setattr("benchmarks.timing.FLUSH_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr("benchmarks.timing.COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("beta", BETAS)
def test_every_pass_is_timed(beta):
    record = kernels.run_case(Case(12, 97, dtype="bf16", beta=beta), PLAN, Stopwatch(CPU))
    inner = [*kernels.READS]
    assert list(record["contestants"]) == (
        inner if beta == 0.5 else [name for name in inner if name not in (kernels.K1, kernels.K2)]
    )
    assert all(len(found["total_s"]) == 2 for found in record["contestants"].values())
    moved = record["moved_bytes"]
    if beta == 0.5:
        assert moved[kernels.K1] + moved[kernels.K2] + moved[kernels.K3] == Case(12, 97).total_bytes
    else:
        assert moved[kernels.K1_TRAINING] + moved[kernels.K3_LABELS] == Case(12, 97, beta=beta).total_bytes


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tp", [1, 4])
def test_contestants_have_the_oracles_gradient(beta, tp):
    record = divergence.run_case(Case(12, 96, tp, "fp32", beta), PLAN, Stopwatch(CPU))
    assert list(record["contestants"]) == list(contestants.CONTESTANTS)
    ran = {name for name, found in record["contestants"].items() if found["status"] == "ok"}
    assert {OURS, "eager torch", "torch.compile"} <= ran
    for name in ran:
        assert record["contestants"][name]["error"] < 1e-5, name
        assert len(record["contestants"][name]["total_s"]) == 2, name
    for name in record["contestants"].keys() - ran:
        assert record["contestants"][name]["status"], name


def test_the_fused_head_has_the_oracles_gradient():
    record = head.run_case(head.HeadCase(12, 16, 96, dtype="fp32"), PLAN, Stopwatch(CPU))
    for name in (OURS, head.TRAINING):
        assert record["contestants"][name]["error"] < 1e-5 and record["weight_errors"][name] < 1e-5
    assert record["contestants"][head.PRODUCTS]["status"] == "ok"


def test_the_four_products_are_those_of_the_fused_head(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_TOKENS", 5)
    heads = head.Heads.of(head.HeadCase(12, 16, 96, dtype="fp32"), CPU)
    operations = []
    original = torch.mm

    def counting(a, b, **options):
        operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return original(a, b, **options)

    monkeypatch.setattr(torch, "mm", counting)
    for step in head.products(heads).steps:
        step()
    assert sum(operations) == head.HeadCase(12, 16, 96).operations


def test_the_bytes_of_a_case():
    assert [Case(8192, 151936, 4, "bf16", beta).total_bytes / (8192 * 37984 * 2) for beta in BETAS] == [5, 7, 5]
    assert len(set(full_grid())) == 48


def test_repetitions_alternate_and_stop_when_their_time_is_used():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert {name: len(found) for name, found in in_turn(runs, Plan(3, 3, 0.0)).items()} == {"a": 3, "b": 3}
    assert order == ["a", "b"] * 3
    assert len(in_turn(runs, Plan(9, 2, 0.0))["a"]) == 2
    assert len(in_turn(runs, Plan(9, 2, 60.0))["a"]) == 9


def test_a_slow_warm_up_is_the_one_repetition():
    found = compete({"slow": lambda: Work(lambda: None)}, Plan(repeats=9, least=1, seconds=-1.0), Stopwatch(CPU))
    assert len(found["contestants"]["slow"]["total_s"]) == 1
    assert len(found["copy"]["seconds"]) == 1


def test_peers_may_fail_but_ours_must_not():
    def unavailable():
        raise Unavailable("not installed", "pip install it")

    def broken():
        raise RuntimeError("broken")

    found = compete({"a": unavailable, "b": broken, "c": lambda: Work(lambda: None)}, PLAN, Stopwatch(CPU))
    assert [record["status"] for record in found["contestants"].values()] == [
        "not installed",
        "failed: RuntimeError: broken",
        "ok",
    ]
    assert found["contestants"]["a"]["install"] == "pip install it"
    with pytest.raises(RuntimeError, match="broken"):
        compete({OURS: broken}, PLAN, Stopwatch(CPU))


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_peak_memory_sees_what_is_freed_again():
    with PeakMemory(CPU) as memory:
        torch.ones(25 << 20, dtype=torch.float32).sum()
    if memory.growth is None:
        pytest.skip("this system does not let a process reset its peak")
    assert memory.growth == pytest.approx(100 << 20, rel=0.05)
    with PeakMemory(CPU) as memory:
        torch.ones(1 << 10).sum()
    assert memory.growth < 5 << 20


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    arguments = "--device cpu --tokens 6 --vocab 40 --dtypes fp32 bf16 --betas 0.5 --repeats 2 --output"
    monkeypatch.setattr(sys, "argv", ["loss.py", *arguments.split(), str(tmp_path)])
    monkeypatch.setattr(head, "default_cases", lambda device: [head.HeadCase(6, 8, 40, dtype="fp32")])
    monkeypatch.setattr(kernels, "default_cases", lambda device: [Case(6, 41, dtype="fp32")])
    assert loss.main() == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("loss_*.json")
    run = json.loads(path.read_text())
    assert [case["case"] for case in run["divergence"]] == ["6 × 40, fp32, β 0.5", "6 × 40, bf16, β 0.5"]
    assert all(len(case["contestants"][OURS]["total_s"]) == 2 for case in run["divergence"])
    markdown = path.with_suffix(".md").read_text()
    for text in ("6 × 40, bf16, β 0.5", "6 × 41, fp32, β 0.5", "6 × 8 × 40, fp32, β 0.5", "eager torch", head.PRODUCTS):
        assert text in printed and text in markdown
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
