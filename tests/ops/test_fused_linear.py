"""The heads fused with the loss: equal to materialised logits, over chunks and tensor-parallel ranks."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ops.oracle import BETAS, MIDDLES, divergence_of, oracle, random_logits, relative_error, topk_divergence_of
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd.ops import (
    DivergenceSpec,
    FusedLinearOptions,
    LinearHead,
    OutputHead,
    PerToken,
    TokenTargets,
    TopK,
    TopKSpec,
    fused_linear_divergence,
    reference,
    vocab_parallel_topk,
)

STUDENT_SIZE, TEACHER_SIZE = 8, 12
TEMPERATURE = 0.9
UPSTREAM = 3.0


@dataclass(frozen=True)
class Extras:
    """What a head has beside its weight."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


CAPPED = Extras(softcap=3.0)  # of logits of about 4: most are bent, and some are at the cap
EVERYTHING = Extras(bias=True, scale=0.6, softcap=5.0)


@dataclass(frozen=True)
class Case:
    beta: float = 0.5
    divergence: str = "jsd"
    dtype: torch.dtype = torch.float64
    tokens: int = 23
    width: int = 32  # rows of the whole head, padding included
    vocab_size: int | None = None
    chunk_tokens: int = 5
    teacher: bool = True
    cross_entropy: str = "loss"  # "loss", "statistic" or "none"
    student_extras: Extras = Extras()
    teacher_extras: Extras = Extras()

    def tensors(self):
        """Keyword arguments of an unsharded ``call_op``."""
        size = self.vocab_size or self.width
        labels = torch.arange(self.tokens) * 7 % size
        labels[::4] = -100
        token_weights = random_logits(self.tokens, seed=6, scale=1.0).abs()
        token_weights[1::5] = 0
        return {
            "student_hidden": random_logits(self.tokens, STUDENT_SIZE, seed=0, scale=1.5, dtype=self.dtype),
            "student_weight": random_logits(self.width, STUDENT_SIZE, seed=1, scale=0.7, dtype=self.dtype),
            "teacher_hidden": random_logits(self.tokens, TEACHER_SIZE, seed=2, dtype=self.dtype)
            if self.teacher
            else None,
            "teacher_weight": random_logits(self.width, TEACHER_SIZE, seed=3, dtype=self.dtype)
            if self.teacher
            else None,
            "student_bias": random_logits(self.width, seed=4, scale=1.0, dtype=self.dtype)
            if self.student_extras.bias
            else None,
            "teacher_bias": random_logits(self.width, seed=5, scale=1.0, dtype=self.dtype)
            if self.teacher_extras.bias
            else None,
            "token_weights": token_weights,
            "labels": None if self.cross_entropy == "none" else labels,
            "sft_weights": random_logits(self.tokens, seed=7, scale=1.0).abs()
            if self.cross_entropy == "loss"
            else None,
        }

    @property
    def options(self):
        return {
            "beta": self.beta,
            "divergence": self.divergence,
            "temperature": TEMPERATURE,
            "vocab_size": self.vocab_size,
        }

    @property
    def extras(self):
        return {"student_extras": self.student_extras, "teacher_extras": self.teacher_extras}


def head(weight, bias, extras):
    """A head with tensors of ``Case.tensors``."""
    return OutputHead(weight, bias, extras.scale, extras.softcap)


def call_op(
    *,
    student_hidden,
    student_weight,
    student_bias=None,
    student_extras=Extras(),
    teacher_hidden=None,
    teacher_weight=None,
    teacher_bias=None,
    teacher_extras=Extras(),
    token_weights,
    labels=None,
    sft_weights=None,
    topk=None,
    k=None,
    tail_mode="renormalize",
    chunk_tokens=1024,
    upstream=None,
    **spec,
):
    """``fused_linear_divergence`` with the fields of its arguments as keywords."""
    return fused_linear_divergence(
        LinearHead(student_hidden, head(student_weight, student_bias, student_extras)),
        topk
        if teacher_hidden is None
        else LinearHead(teacher_hidden, head(teacher_weight, teacher_bias, teacher_extras)),
        TokenTargets(token_weights, labels, sft_weights),
        DivergenceSpec(**spec),
        TopKSpec(k, tail_mode),
        FusedLinearOptions(chunk_tokens, upstream),
    )


def logits_of(x, who, extras):
    """The logits of ``Case.tensors`` in fp64, by the reference."""
    hidden, weight, bias = (
        None if x[f"{who}_{name}"] is None else x[f"{who}_{name}"].double() for name in ("hidden", "weight", "bias")
    )
    return reference.logits(hidden, weight, bias=bias, scale=extras.scale, softcap=extras.softcap)


def with_gradients(x):
    """Set the student's tensors of ``Case.tensors`` to require gradients, in place, and return them."""
    tensors = (x[f"student_{name}"] for name in ("hidden", "weight", "bias"))
    return tuple(tensor.requires_grad_() for tensor in tensors if tensor is not None)


def materialised(case):
    """(total, PerToken, gradients of the student's tensors) through the fp64 reference and whole logits."""
    x = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in case.tensors().items()
    }
    inputs = with_gradients(x)
    options, size = case.options, case.vocab_size
    student = logits_of(x, "student", case.student_extras)
    zeros = torch.zeros(case.tokens, dtype=torch.float64)
    divergence = teacher_entropy = agreement = cross_entropy = forward_kl = reverse_kl = zeros
    if case.teacher:
        teacher = logits_of(x, "teacher", case.teacher_extras)
        divergence = reference.divergence(student, teacher, **options)
        forward_kl, reverse_kl = (
            reference.divergence(student, teacher, **(options | {"beta": b, "divergence": "jsd"})) for b in (0.0, 1.0)
        )
        teacher_entropy = reference.entropy(teacher, temperature=TEMPERATURE, vocab_size=size)
        agreement = (student[:, :size].argmax(-1) == teacher[:, :size].argmax(-1)).double()
    if x["labels"] is not None:
        cross_entropy = reference.cross_entropy(student, x["labels"], vocab_size=size)
    total = (x["token_weights"] * divergence).sum()
    if x["sft_weights"] is not None:
        total = total + (x["sft_weights"] * cross_entropy).sum()
    student_entropy = reference.entropy(student, temperature=TEMPERATURE, vocab_size=size)
    statistics = PerToken(
        divergence, cross_entropy, teacher_entropy, student_entropy, forward_kl, reverse_kl, agreement
    )
    gradients = tuple(map(torch.zeros_like, inputs))
    if total.requires_grad and case.tokens:
        gradients = torch.autograd.grad(UPSTREAM * total, inputs)
    return total.detach(), PerToken(*(column.detach() for column in statistics)), *gradients


def run_fused(rank, world_size, cases):
    """For each case this rank's total, statistics, partial hidden gradient, and gradients of the head's tensors."""
    results = []
    for case in cases:
        x = case.tensors()
        for name in ("student_weight", "teacher_weight", "student_bias", "teacher_bias"):
            x[name] = None if x[name] is None else x[name].chunk(world_size)[rank].clone()
        inputs = with_gradients(x)
        common = case.options | case.extras | {"chunk_tokens": case.chunk_tokens}
        total, per_token = call_op(**x, **common, group=dist.group.WORLD)
        (UPSTREAM * total).backward()
        results.append((total, tuple(per_token), *(tensor.grad for tensor in inputs)))
    return results


CASES = [
    *(Case(beta) for beta in BETAS),
    *(Case(beta, dtype=dtype) for beta in (0.0, 0.5, 1.0) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(beta, name, torch.float32) for name, beta in MIDDLES),
    Case(vocab_size=27),  # padding on one shard
    Case(vocab_size=13, cross_entropy="statistic"),  # all of several shards
    Case(vocab_size=1),
    Case(cross_entropy="none"),
    Case(teacher=False),
    Case(teacher=False, vocab_size=13),
    Case(teacher=False, cross_entropy="none"),
    Case(chunk_tokens=1),
    Case(chunk_tokens=23),
    Case(chunk_tokens=1024),
    Case(tokens=0),
    Case(tokens=1),
    *(Case(beta, student_extras=EVERYTHING, teacher_extras=CAPPED) for beta in (0.0, 0.5, 1.0)),
    *(Case(dtype=dtype, student_extras=EVERYTHING) for dtype in (torch.float32, torch.bfloat16)),
    *(Case(beta, name, torch.float32, student_extras=CAPPED) for name, beta in MIDDLES),
    Case(student_extras=Extras(bias=True), vocab_size=13),
    Case(student_extras=Extras(scale=0.25), dtype=torch.float32),
    Case(teacher_extras=EVERYTHING, cross_entropy="none"),
    Case(teacher=False, student_extras=EVERYTHING, vocab_size=27),
    Case(tokens=0, student_extras=EVERYTHING),
]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_the_materialised_reference(gloo_world, tp):
    for case, *by_rank in zip(CASES, *gloo_world(tp).run(run_fused, CASES), strict=True):
        totals, statistics, hidden_gradients, weight_gradients, *bias_gradients = zip(*by_rank, strict=True)
        assert len(bias_gradients) == case.student_extras.bias
        assert all(torch.equal(total, totals[0]) for total in totals), case
        assert all(
            torch.equal(mine, first) for other in statistics for mine, first in zip(other, statistics[0], strict=True)
        )
        total, per_token, hidden_gradient, *of_head = materialised(case)
        # bf16: the logits themselves are rounded, so even the loss is only as good as that.
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[case.dtype]
        accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
        assert totals[0].dtype == accumulate and totals[0].shape == ()
        assert hidden_gradients[0].dtype == weight_gradients[0].dtype == case.dtype
        assert relative_error(totals[0], total) < tolerance, case
        assert relative_error(sum(g.double() for g in hidden_gradients), hidden_gradient) < tolerance, case
        for actual, expected in zip([weight_gradients, *bias_gradients], of_head, strict=True):
            assert relative_error(torch.cat(actual), expected) < tolerance, case
        for name, actual, expected in zip(PerToken._fields, statistics[0], per_token, strict=True):
            assert actual.dtype == accumulate and actual.shape == (case.tokens,)
            assert relative_error(actual, expected) < tolerance, (case, name)


def call(case, **changes):
    common = case.options | case.extras | {"chunk_tokens": case.chunk_tokens}
    return call_op(**(case.tensors() | common | changes))


@pytest.mark.parametrize("beta", BETAS)
def test_equals_the_materialised_op_in_fp32(beta):
    case = Case(beta, dtype=torch.float32, cross_entropy="none")
    x = case.tensors()
    hidden, weight = x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()
    total, per_token = call(case, student_hidden=hidden, student_weight=weight)
    fused = torch.autograd.grad(total, (hidden, weight))
    logits = hidden @ weight.t(), x["teacher_hidden"] @ x["teacher_weight"].t()
    divergence = divergence_of(*logits, **case.options)
    whole = torch.autograd.grad((divergence * x["token_weights"]).sum(), (hidden, weight))
    torch.testing.assert_close(per_token.divergence, divergence.detach(), rtol=1e-5, atol=1e-9)
    for actual, expected in zip(fused, whole, strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_gradcheck():
    case = Case(tokens=4, width=6, vocab_size=5, chunk_tokens=2, student_extras=EVERYTHING, teacher_extras=CAPPED)
    for choice in (case, replace(case, student_extras=Extras())):
        names = ["student_hidden", "student_weight"] + ["student_bias"] * choice.student_extras.bias
        inputs = with_gradients(choice.tensors())
        assert torch.autograd.gradcheck(
            lambda *x, choice=choice, names=names: call(choice, **dict(zip(names, x, strict=True)))[0], inputs
        )


def test_a_token_of_weight_zero_adds_exactly_zero_even_where_the_divergence_is_infinite():
    case = Case(beta=0.0, cross_entropy="none")
    x = case.tensors()
    hidden, weight = x["student_hidden"], x["student_weight"]
    # At token 1, whose weight is 0, the logit of id 3 overflows to -inf: the student excludes it, the teacher does not.
    hidden[:, 0], weight[:, 0] = 0, 0
    hidden[1, 0], weight[3, 0] = 1e10, -1e300
    hidden.requires_grad_()
    total, per_token = call(case, student_hidden=hidden, student_weight=weight)
    total.backward()
    assert per_token.divergence[1].isinf() and total.isfinite()
    assert (hidden.grad[1] == 0).all() and hidden.grad.isfinite().all()


@dataclass(frozen=True)
class TopKCase:
    tail_mode: str
    k: int = 5
    known: bool = False  # a TopK is given, instead of the teacher's hidden states
    beta: float = 0.5
    divergence: str = "jsd"
    vocab_size: int | None = None
    sft: bool = True
    dtype: torch.dtype = torch.float64
    extras: Extras = Extras()  # of both heads

    @property
    def base(self):
        return Case(
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            cross_entropy="loss" if self.sft else "statistic",
            student_extras=self.extras,
            teacher_extras=self.extras,
        )


def run_topk(rank, world_size, cases):
    """As `run_fused`, against the teacher's top-k."""
    results = []
    for case in cases:
        x = case.base.tensors()
        for name in ("student_weight", "teacher_weight", "student_bias", "teacher_bias"):
            x[name] = None if x[name] is None else x[name].chunk(world_size)[rank].clone()
        common = {"group": dist.group.WORLD, "vocab_size": case.vocab_size, "temperature": TEMPERATURE}
        topk = None
        if case.known:
            topk = vocab_parallel_topk(logits_of(x, "teacher", case.extras), case.k, **common)
            x["teacher_hidden"] = None
        inputs = with_gradients(x)
        total, per_token = call_op(
            **x,
            **common,
            beta=case.beta,
            divergence=case.divergence,
            **case.base.extras,
            topk=topk,
            k=case.k,
            tail_mode=case.tail_mode,
            chunk_tokens=case.base.chunk_tokens,
        )
        (UPSTREAM * total).backward()
        results.append((total, per_token.divergence, *(tensor.grad for tensor in inputs)))
    return results


TOPK_CASES = [
    TopKCase(tail, known=known, sft=sft)
    for tail in ("renormalize", "bucket")
    for known in (False, True)
    for sft in (0, 1)
] + [
    TopKCase("bucket", vocab_size=13),
    TopKCase("renormalize", vocab_size=13, k=13),
    TopKCase("bucket", k=1, beta=0.0, dtype=torch.float32),
    TopKCase("renormalize", k=7, beta=1.0, dtype=torch.float32),
    *(TopKCase("bucket", divergence=name) for name, _ in MIDDLES),
    *(
        TopKCase(tail, known=known, sft=sft, vocab_size=27, extras=EVERYTHING)
        for tail, known, sft in [("renormalize", False, True), ("renormalize", True, False), ("bucket", False, False)]
    ),
    TopKCase("bucket", k=3, beta=0.0, dtype=torch.float32, extras=EVERYTHING),
]


@pytest.mark.parametrize("tp", [1, 2])
def test_top_k_equals_the_materialised_op(gloo_world, tp):
    for case, *by_rank in zip(TOPK_CASES, *gloo_world(tp).run(run_topk, TOPK_CASES), strict=True):
        totals, divergences, hidden_gradients, *of_head = zip(*by_rank, strict=True)
        x = replace(case.base, dtype=torch.float64).tensors()
        inputs = with_gradients(x)
        student, teacher = (logits_of(x, who, case.extras) for who in ("student", "teacher"))
        common = {"temperature": TEMPERATURE, "vocab_size": case.vocab_size}
        topk = vocab_parallel_topk(teacher, case.k, **common)
        options = {"beta": case.beta, "divergence": case.divergence, "tail_mode": case.tail_mode}
        divergence = topk_divergence_of(student, topk, **options, **common)
        total = (x["token_weights"] * divergence).sum()
        if case.sft:
            cross_entropy = reference.cross_entropy(student, x["labels"], vocab_size=case.vocab_size)
            total = total + (x["sft_weights"] * cross_entropy).sum()
        expected = torch.autograd.grad(UPSTREAM * total, inputs)
        tolerance = 1e-9 if case.dtype == torch.float64 else 1e-5
        assert all(torch.equal(x, totals[0]) for x in totals), case
        assert relative_error(totals[0], total.detach()) < tolerance, case
        assert relative_error(divergences[0], divergence.detach()) < tolerance, case
        assert relative_error(sum(hidden_gradients), expected[0]) < tolerance, case
        for actual, gradient in zip(of_head, expected[1:], strict=True):
            assert relative_error(torch.cat(actual), gradient) < tolerance, case


@pytest.mark.parametrize("upstream", [None, UPSTREAM])
@pytest.mark.parametrize("shared_with_an_embedding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_receives_the_gradient_of_the_weight(upstream, shared_with_an_embedding, dtype):
    case = Case(dtype=dtype)
    x = case.tensors()
    weight = x["student_weight"].requires_grad_()
    total, _ = call(case, student_weight=weight)
    (expected,) = torch.autograd.grad(UPSTREAM * total, weight)

    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = shared_with_an_embedding
    for _ in range(2):
        total, _ = call(case, student_weight=weight, upstream=upstream)
        (UPSTREAM * total).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape and (not shared_with_an_embedding or (weight.grad == 0).all())
    assert relative_error(weight.main_grad - 1, 2 * expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("upstream", [None, UPSTREAM])
def test_main_grad_receives_the_gradient_of_the_bias(upstream):
    case = Case(dtype=torch.bfloat16, student_extras=EVERYTHING)
    bias = case.tensors()["student_bias"].requires_grad_()
    expected = materialised(case)[-1]
    bias.main_grad = torch.ones(bias.shape)
    bias.grad_added_to_main_grad = False
    for _ in range(2):
        total, _ = call(case, student_bias=bias, upstream=upstream)
        (UPSTREAM * total).backward()
    assert bias.grad_added_to_main_grad and bias.grad.shape == bias.shape
    assert relative_error(bias.main_grad - 1, 2 * expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [{}, {"k": 5, "tail_mode": "bucket"}])
def test_logits_far_above_the_softcap_are_the_cap_and_have_no_gradient(dtype, topk):
    case = Case(dtype=dtype, student_extras=Extras(bias=True, softcap=2.6))  # no cap that 16 bits hold
    x = case.tensors()
    x["student_hidden"][1] *= 1e3
    x["student_bias"][::2], x["student_bias"][1::2] = 3e4, -3e4
    x["student_bias"][:2] = 0
    inputs = with_gradients(x)
    total, per_token = call(case, **x, **topk)
    gradients = torch.autograd.grad(total, inputs)
    assert all(column.isfinite().all() for column in per_token) and all(g.isfinite().all() for g in gradients)
    assert gradients[2][2:].abs().max() < 1e-5 * gradients[2][:2].abs().min()
    logits = head(x["student_weight"], x["student_bias"], case.student_extras).compute_logits(x["student_hidden"])
    assert (logits[:, 2:] == torch.tensor([2.6, -2.6], dtype=dtype).repeat(15)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_and_scale_cost_no_rounding_of_their_own(dtype):
    x = Case(dtype=dtype, student_extras=EVERYTHING).tensors()
    extras = Extras(bias=True, scale=0.3)
    exact = logits_of(x, "student", extras)
    found = head(x["student_weight"], x["student_bias"], extras).compute_logits(x["student_hidden"])
    torch.testing.assert_close(found, exact.to(dtype), rtol=0, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": float("inf")}, {"softcap": -1.0}, {"softcap": 0.0}])
def test_scale_and_softcap_must_be_positive_and_finite(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be positive and finite"):
        OutputHead(torch.zeros(2, 2), **options)


def test_a_main_grad_that_is_gone_before_backward_is_an_error():
    case = Case(dtype=torch.float32)
    weight = case.tensors()["student_weight"].requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    total, _ = call(case, student_weight=weight, upstream=1.0)
    weight.main_grad = None
    with pytest.raises(RuntimeError, match=r"weight\.main_grad: None in backward"):
        total.backward()


def test_another_upstream_than_the_given_one_is_an_error():
    case = Case(dtype=torch.float32)
    hidden = case.tensors()["student_hidden"].requires_grad_()
    total, _ = call(case, student_hidden=hidden, upstream=2.0)
    with pytest.raises(RuntimeError, match="the gradient of the total is not `upstream`"):
        total.backward()


@pytest.mark.parametrize("upstream", [None, UPSTREAM])
def test_without_a_main_grad_the_upstream_makes_no_difference(upstream):
    case = Case(dtype=torch.float32)
    x = case.tensors()
    inputs = x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()
    total, _ = call(case, student_hidden=inputs[0], student_weight=inputs[1], upstream=upstream)
    _, _, *expected = materialised(case)
    for actual, gradient in zip(torch.autograd.grad(UPSTREAM * total, inputs), expected, strict=True):
        assert relative_error(actual, gradient) < 1e-5


class LogitRows(TorchDispatchMode):
    """Records the most rows of any matrix with `width` columns that an operation returned."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.width:
                self.rows = max(self.rows, tensor.shape[0])
        return result


def test_at_most_one_chunk_of_logits_exists_and_only_gradients_are_saved():
    case = Case(tokens=67, width=211, chunk_tokens=16, dtype=torch.float32)
    x = case.tensors()
    hidden, weight = x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()
    saved = []
    with (
        LogitRows(211) as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t),
    ):
        total, _ = call(case, student_hidden=hidden, student_weight=weight)
        total.backward()
    assert seen.rows == 14  # 67 tokens in 5 chunks of 13 or 14, not four of 16 and a rest
    assert saved == [hidden.shape, weight.shape]


def test_no_gradient_is_computed_where_none_is_needed():
    case = Case(tokens=10, chunk_tokens=10)
    x = case.tensors()
    products = []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(func)
            return func(*args, **(kwargs or {}))

    hidden, weight = x["student_hidden"].requires_grad_(), x["student_weight"]
    with CountProducts():
        expected, _ = call(case, student_hidden=hidden)
        assert len(products) == 3  # two heads and the hidden gradient: the weight wants none
        products.clear()
        with torch.no_grad():
            total, per_token = call(case, student_hidden=hidden, student_weight=weight.requires_grad_())
        assert len(products) == 2
    assert torch.equal(total, expected.detach())
    assert not total.requires_grad and not any(column.requires_grad for column in per_token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "sft_weights: given without labels"),
        ({"chunk_tokens": 0}, "chunk_tokens = 0: must be >= 1"),
        (
            {"teacher_weight": torch.zeros(31, TEACHER_SIZE).double()},
            r"teacher.weight = torch.float64 \[31, 12\]: must be torch.float64 \[32, 12\]",
        ),
        (
            {"teacher_hidden": torch.zeros(22, TEACHER_SIZE).double()},
            r"teacher.hidden = torch.float64 \[22, 12\]: must be torch.float64 \[23, 12\]",
        ),
        (
            {"teacher_hidden": torch.zeros(23, TEACHER_SIZE)},
            r"teacher.hidden = torch.float32 \[23, 12\]: must be torch.float64 \[23, 12\]",
        ),
        (
            {"student_bias": torch.zeros(31).double()},
            r"student.bias = torch.float64 \[31\]: must be torch.float64 \[32\]",
        ),
        ({"token_weights": torch.zeros(4)}, r"token_weights = \[4\]: must be \[23\]"),
        ({"vocab_size": 33}, "vocab_size = 33: must be from 1 to 32"),
        ({"k": 33}, "k = 33: must be from 1 to 32"),
        ({"k": 0}, "k = 0: must be >= 1"),
        ({"k": 3, "tail_mode": "drop"}, "tail_mode = 'drop': must be one of renormalize, bucket"),
        (
            {
                "topk": TopK(torch.zeros(22, 1, dtype=torch.int64), torch.zeros(22, 1)),
                "teacher_hidden": None,
                "teacher_weight": None,
            },
            r"teacher = TopK \[22, 1\]: must be of 23 tokens",
        ),
        ({"beta": -0.1}, "beta = -0.1"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        call(Case(), **changes)


def test_oracle_and_reference_agree_on_the_logit_gradient():
    s, t = (random_logits(3, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    value, gradient = oracle(s, t, torch.ones(3), beta=0.5)
    hidden = s.clone().requires_grad_()
    head = OutputHead(torch.eye(7).double())
    total, per_token = fused_linear_divergence(
        LinearHead(hidden, head), LinearHead(t, head), TokenTargets(torch.ones(3)), DivergenceSpec(beta=0.5)
    )
    total.backward()
    torch.testing.assert_close(per_token.divergence, value)
    torch.testing.assert_close(hidden.grad, gradient)
