"""The passes: kernels beside plain torch, the ways they walk, what they refuse, and torch.library's own checks."""

import itertools
import os
import subprocess
import sys
import types

import pytest
import torch
from ops.oracle import MIDDLES, POINTS, divergence_of, random_logits, relative_error, rounding

from megatron_gkd.errors import UserError
from megatron_gkd.ops import passes, torch_passes
from megatron_gkd.ops.divergence import _backward, _forward
from megatron_gkd.ops.forward import compute_forward, compute_student_forward
from megatron_gkd.ops.params import ChunkTargets, DivergenceRows, LabelRows, Logits, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec

ROWS = 37
WIDTHS = [1, 5, 16, 21, 64, 2049]
needs_kernels = pytest.mark.skipif(passes.implementation() == "torch", reason="plain torch is what is tested")


def forward(logits, spec, labels=None):
    """``compute_forward`` with its metrics."""
    results = TokenResults.empty(logits.student, has_losses=False)
    return compute_forward(logits, spec, results, ChunkTargets(labels=labels)), results.per_token


def student_forward(student, spec, labels):
    """``compute_student_forward`` with its metrics."""
    results = TokenResults.empty(student, has_losses=False)
    return compute_student_forward(student, spec, results, ChunkTargets(labels=labels)), results.per_token


def everything(divergence, beta, width, dtype=torch.float32, *, in_place=False, offset=0, module=passes, softcap=None):
    """What the three passes return for some rows, each with a label, as a list of tensors."""
    storage = [random_logits(ROWS, width + offset, seed=seed, dtype=dtype) for seed in (0, 1)]
    logits = Logits(*(x[:, offset:] for x in storage))  # unaligned rows, and strides that are no multiple of anything
    labels = torch.arange(ROWS) % width
    labels[::3] = -1
    spec = DivergenceSpec(beta, 0.9, divergence).on_shard(width, softcap)
    if softcap is not None:
        module.softcap(logits.student, softcap)
    statistics = module.statistics(logits, spec, moments=True, untempered=True)
    found, _ = forward(logits, spec, labels.clamp(min=0))
    weight = random_logits(ROWS, seed=2)
    weight[::5] = 0
    label_weight = torch.where(labels < 0, 0, random_logits(ROWS, seed=3))
    out = logits.student if in_place else torch.full((ROWS, width + 3), torch.nan, dtype=dtype)
    normalizers = found.normalizers
    sums = module.sums(logits, normalizers, spec) if spec.needs_sums else statistics[:, :2]
    rows = DivergenceRows(normalizers, found.slope_sum, weight)
    module.gradient(out, logits, rows, LabelRows(found.labels.normalizers, label_weight, labels), spec)
    return [statistics, sums, out]


def student_alone(width, dtype, *, offset=0, in_place=False, module=passes, softcap=None):
    """What the two passes without a teacher return, as a list of tensors."""
    student = random_logits(ROWS, width + offset, seed=0, dtype=dtype)[:, offset:]
    labels = torch.arange(ROWS) % width
    spec = DivergenceSpec(0.5, 0.9).on_shard(width)
    if softcap is not None:
        module.softcap(student, softcap)
    statistics = module.student_statistics(student, spec)
    found, _ = student_forward(student, spec, labels)
    weight = random_logits(ROWS, seed=3)
    weight[::5] = 0
    out = student if in_place else torch.full((ROWS, width + 3), torch.nan, dtype=dtype)
    labels = LabelRows(found.normalizers, weight, labels)
    module.cross_entropy_gradient(out, student, labels, softcap)
    return [statistics, out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_student_alone_equals_the_student_beside_a_teacher(width, dtype):
    logits = Logits(*(random_logits(ROWS, width, seed=seed, dtype=dtype) for seed in (0, 1)))
    spec = DivergenceSpec(0.5, 0.9).on_shard(width)
    labels = torch.arange(ROWS) % width
    both = passes.statistics(logits, spec, moments=True, untempered=True)
    assert torch.equal(passes.student_statistics(logits.student, spec), both[:, [0, 1, 4, 10]])
    found, token = forward(logits, spec, labels)
    alone, token_alone = student_forward(logits.student, spec, labels)
    assert torch.equal(token_alone.student_entropy, token.student_entropy)
    assert torch.equal(token_alone.cross_entropy, token.cross_entropy)
    assert all(torch.equal(x, y) for x, y in zip(alone, found.labels, strict=True))
    rows = DivergenceRows(found.normalizers, found.slope_sum, torch.zeros(ROWS))
    label_rows = LabelRows(alone.normalizers, random_logits(ROWS, seed=3), labels)
    outs = torch.empty(2, ROWS, width, dtype=dtype)
    passes.cross_entropy_gradient(outs[0], logits.student, label_rows)
    passes.gradient(outs[1], logits, rows, label_rows, spec)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_student_alone_in_place_and_in_plain_torch(width, dtype):
    statistics, out = student_alone(width, dtype, offset=1)
    assert torch.equal(student_alone(width, dtype, offset=1, in_place=True)[1], out[:, :width])
    assert (out[:, width:] == 0).all() and (out[::5] == 0).all()
    expected = student_alone(width, dtype, offset=1, module=torch_passes)
    torch.testing.assert_close(statistics, expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out, expected[1], rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize(("divergence", "beta"), POINTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_equal_plain_torch(divergence, beta, width):
    ours, theirs = (everything(divergence, beta, width, offset=1, module=module) for module in (passes, torch_passes))
    statistics, expected = ours[0], theirs[0]
    assert torch.equal(statistics[:, [0, 2, 6, 9]], expected[:, [0, 2, 6, 9]])  # maxima and their ids
    torch.testing.assert_close(statistics, expected, rtol=2e-5, atol=2e-5)
    # Slopes have a unit of their own in each implementation.
    torch.testing.assert_close(ours[1][:, 0], theirs[1][:, 0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("module", [passes, torch_passes], ids=["passes", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 21, 2049])
def test_the_softcap_against_fp64(width, dtype, module):
    cap = 30.0
    logits = random_logits(ROWS, width + 1, seed=0, scale=20.0, dtype=dtype)[:, 1:]
    logits[:4, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-4])
    exact = cap * (logits.double() / cap).tanh()
    module.softcap(logits, cap)
    tolerance = max(rounding(dtype), 1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=tolerance, atol=0, equal_nan=True)
    assert logits[:2, 0].tolist() == [cap, -cap]


@pytest.mark.parametrize("module", [passes, torch_passes], ids=["passes", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "beta"), [("jsd", 0.0), ("jsd", 1.0), *MIDDLES])
def test_the_gradient_before_a_softcap_is_that_by_the_logits_times_the_slope(divergence, beta, dtype, module):
    cap, width = 4.0, 77
    student, teacher = (random_logits(ROWS, width + 1, seed=seed, dtype=dtype)[:, 1:] for seed in (0, 1))
    module.softcap(student, cap)
    labels = torch.arange(ROWS) * 2 - 1
    weight, label_weight = random_logits(ROWS, seed=2), random_logits(ROWS, seed=3)
    spec = DivergenceSpec(beta, 0.9, divergence)
    found, _ = forward(Logits(student, teacher), spec.on_shard(width), labels.clamp(min=0))
    rows = DivergenceRows(found.normalizers, found.slope_sum, weight)
    label_rows = LabelRows(found.labels.normalizers, label_weight, labels)
    by_logits, before_softcap = torch.full((2, ROWS, width + 3), torch.nan, dtype=dtype)
    for out, softcap in ((by_logits, None), (before_softcap, cap)):
        module.gradient(out, Logits(student, teacher), rows, label_rows, spec.on_shard(width, softcap))
    slope = 1 - (student.double() / cap).square()
    assert slope.min() < 0.2 and slope.max() > 0.9
    expected = by_logits[:, :width].double() * slope
    tolerance = {"rtol": max(2 * rounding(dtype), 1e-5), "atol": 1e-7}
    torch.testing.assert_close(before_softcap[:, :width].double(), expected, **tolerance)
    assert not before_softcap[:, width:].any()
    for out, softcap in ((by_logits, None), (before_softcap, cap)):
        module.cross_entropy_gradient(out, student, label_rows, softcap)
    torch.testing.assert_close(before_softcap[:, :width].double(), by_logits[:, :width].double() * slope, **tolerance)


@pytest.mark.parametrize(("divergence", "beta"), MIDDLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_in_place_equals_out_of_place_and_padding_becomes_zero(divergence, beta, dtype, width):
    for softcap in (None, 4.0):
        out = everything(divergence, beta, width, dtype, softcap=softcap)[-1]
        in_place = everything(divergence, beta, width, dtype, in_place=True, softcap=softcap)[-1]
        assert torch.equal(in_place, out[:, :width])
        assert (out[:, width:] == 0).all()
        assert (out[::15] == 0).all()  # neither the divergence nor the cross-entropy counts there


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_alignment_changes_nothing(beta, offset):
    for moved, expected in zip(everything("jsd", beta, 77, offset=offset), everything("jsd", beta, 77), strict=True):
        assert moved.shape == expected.shape and moved.isfinite().all()
    s, t = (random_logits(ROWS, 77, seed=seed) for seed in (0, 1))
    spec = DivergenceSpec(beta, 0.9).on_shard(77)
    padded = [torch.cat([torch.zeros(ROWS, offset), x], 1)[:, offset:] for x in (s, t)]
    moved, expected = (forward(Logits(*pair), spec)[1].divergence for pair in (padded, (s, t)))
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_blocks_of_rows_change_nothing_in_plain_torch(beta, monkeypatch):
    whole = everything("jsd", beta, 21, module=torch_passes)
    monkeypatch.setattr(torch_passes, "BLOCK_MIN_ROWS", 1)
    monkeypatch.setattr(torch_passes, "BLOCK_ELEMENTS", 5 * 21)  # 37 rows: seven blocks of 5 and one of 2
    for blockwise, expected in zip(everything("jsd", beta, 21, module=torch_passes), whole, strict=True):
        torch.testing.assert_close(blockwise, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@needs_kernels
def test_threads_change_nothing():
    whole = everything("jsd", 0.5, 2049)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        for other, expected in zip(everything("jsd", 0.5, 2049), whole, strict=True):
            assert torch.equal(other, expected)
    finally:
        torch.set_num_threads(threads)


COMPARE = """
import sys, torch
sys.path[:0] = [{tests!r}]
from ops.test_passes import everything
from megatron_gkd.ops import implementation
torch.save((implementation(), everything("jsd", 0.5, 2049), everything("jsd", 0.5, 77, torch.float16)), {path!r})
"""


@pytest.mark.cpu
@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability, tmp_path):
    path, tests = tmp_path / "found.pt", os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "MEGATRON_GKD_IMPL": "compiled"}
    script = COMPARE.format(tests=tests, path=str(path))
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    implementation, *found = torch.load(path)
    if implementation != f"compiled ({capability})":
        pytest.skip(f"this machine uses {implementation}")
    expected = everything("jsd", 0.5, 2049), everything("jsd", 0.5, 77, torch.float16)
    for theirs, ours in zip(found, expected, strict=True):
        for x, y in zip(theirs, ours, strict=True):
            assert relative_error(x.nan_to_num(), y.nan_to_num()) < (1e-5 if x.dtype == torch.float32 else 1e-3)


CHOICES = "from megatron_gkd.ops import implementation; print(implementation())"


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("choice", "blocked", "expected"),
    [
        ("torch", False, "torch"),
        ("auto", True, "torch"),
        ("compiled", True, "MEGATRON_GKD_IMPL = compiled: there are no compiled kernels"),
        ("fast", False, "MEGATRON_GKD_IMPL = 'fast': must be one of auto, torch, compiled"),
    ],
)
def test_the_choice_of_implementation(choice, blocked, expected):
    block = "import sys; sys.modules['megatron_gkd._C'] = None; " if blocked else ""
    environment = os.environ | {"MEGATRON_GKD_IMPL": choice}
    run = subprocess.run([sys.executable, "-c", block + CHOICES], env=environment, capture_output=True, text=True)
    assert expected in run.stdout + run.stderr
    assert run.stderr.count("so the loss is computed in plain torch") == (choice == "auto")


@pytest.mark.cpu
def test_kernels_of_an_older_build_are_not_used(monkeypatch):
    old = types.ModuleType("megatron_gkd._C")
    old.statistics = old.sums = old.gradient = None
    monkeypatch.setitem(sys.modules, "megatron_gkd._C", old)
    with pytest.raises(UserError, match="built from other sources: it has no student_statistics, cross_entropy_grad"):
        passes._load("compiled")


@pytest.mark.cpu
@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(3, 4)}, r"teacher = Float \[3, 4\] on cpu: must be Float \[3, 5\] on cpu"),
        ({"teacher": torch.zeros(3, 5).half()}, "teacher = Half"),
        (
            {"student": torch.zeros(5, 3).t(), "teacher": torch.zeros(3, 5)},
            r"student = strides \[1, 3\]: rows must be contiguous",
        ),
        ({"mask": torch.ones(3)}, r"mask = Float \[3\] on cpu: must be a contiguous Bool \[3\]"),
        ({"normalizers": torch.zeros(3, 3)}, r"normalizers = Float \[3, 3\]"),
        ({"divergence": "hellinger"}, "divergence = hellinger: unknown"),
        ({"divergence": "forward_kl"}, "divergence = forward_kl: has no sums of its own"),
        ({"temperature": 0.0}, "temperature = 0: must be positive, with an inverse that is a normal float"),
        ({"temperature": 1e-40}, "temperature = 1e-40: must be positive"),
        ({"temperature": 1e39}, "temperature = 1e.39: must be positive"),
        ({"temperature": float("inf")}, "temperature = inf: must be positive"),
        ({"temperature": float("nan")}, "temperature = nan: must be positive"),
    ],
)
def test_the_binding_rejects_wrong_arguments(change, message):
    from megatron_gkd import _C

    arguments = {
        "student": torch.zeros(3, 5),
        "teacher": torch.zeros(3, 5),
        "mask": None,
        "normalizers": torch.zeros(3, 4),
        "divergence": "generalized_jsd",
        "beta": 0.5,
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        _C.sums(*(arguments | change).values())


@pytest.mark.cpu
@needs_kernels
@pytest.mark.parametrize("cap", [0.0, -1.0, 1e-40, 1e39, float("inf"), float("nan")])
def test_the_binding_rejects_a_softcap_that_is_no_number(cap):
    from megatron_gkd import _C

    with pytest.raises(ValueError, match=r"softcap = .*: must be a positive normal float, and so must its inverse"):
        _C.softcap(torch.zeros(3, 5), cap)


@pytest.mark.cpu
@needs_kernels
def test_the_binding_rejects_other_dtypes():
    from megatron_gkd import _C

    logits = torch.zeros(3, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match="logits = Double: must be float32, bfloat16 or float16"):
        _C.statistics(logits, logits, None, 1.0, 0, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [9, 1025])
def test_sanitizer(dtype, width):
    """Small, and every kernel once: what a memory checker is run on."""
    points = [("jsd", 0.0), ("jsd", 0.5), ("jsd", 1.0)]
    for (divergence, beta), offset, softcap in itertools.product(points, [0, 1], [None, 4.0]):
        statistics, sums, out = everything(divergence, beta, width, dtype, offset=offset, softcap=softcap)
        assert statistics.isfinite().all() and sums.isfinite().all() and out.isfinite().all()
    for offset, softcap in itertools.product([0, 1], [None, 4.0]):
        assert all(x.isfinite().all() for x in student_alone(width, dtype, offset=offset, softcap=softcap))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    s, t = random_logits(3, 7, seed=0).requires_grad_(), random_logits(3, 7, seed=1)
    mask = torch.tensor([True, False, True]) if masked else None
    torch.library.opcheck(_forward, (s, t, mask, "jsd", 0.5, 0.9, 6, "", masked))
    _, *saved, _ = _forward(s.detach(), t, mask, "jsd", 0.5, 0.9, 6, "", False)
    torch.library.opcheck(_backward, (torch.ones(3), s.detach(), t, mask, *saved, "jsd", 0.5, 0.9, 6, ""))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_torch_compile_makes_one_graph_of_it(beta):
    s, t = random_logits(3, 7, seed=0), random_logits(3, 7, seed=1)

    def loss(s):
        return (divergence_of(2 * s, t, beta=beta) ** 2).sum()

    eager, compiled = s.clone().requires_grad_(), s.clone().requires_grad_()
    expected = loss(eager)
    expected.backward()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)
