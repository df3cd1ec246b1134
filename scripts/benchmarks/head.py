"""The head fused with the loss: its time beside the four matrix products that no such op can do without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.measure import OURS, TrainingWork, Work, compete, relative_error
from benchmarks.peers import Unavailable, installed
from benchmarks.timing import Plan, Stopwatch
from megatron_gkd.ops import (
    DivergenceSpec,
    FusedLinearOptions,
    LinearHead,
    OutputHead,
    TokenTargets,
    fused_linear_divergence,
    reference,
)
from megatron_gkd.ops.chunking import rows_within_budget

PRODUCTS, TRAINING = "four products", f"{OURS}, as in training"
CHECKED_ROWS = 4  # of the hidden states
CHECKED_IDS = 4  # rows of the head
CHUNK_TOKENS = 1024  # of Liger, by its default


@dataclass(frozen=True)
class HeadCase:
    """`tokens` hidden states of `hidden` features for both models, and heads of `vocab` rows."""

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "bf16"
    beta: float = 0.5

    def __str__(self) -> str:
        return f"{self.tokens} × {self.hidden} × {self.vocab}, {self.dtype}, β {self.beta:g}"

    @property
    def operations(self) -> int:
        """The operations of the four products: logits of both models, gradients of hidden states and head."""
        return 4 * 2 * self.tokens * self.hidden * self.vocab


@dataclass(frozen=True)
class Heads:
    """Hidden states [N, H] and heads [V, H] of student and teacher. The student's need gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def of(cls, case: HeadCase, device: torch.device) -> Heads:
        """Draw inputs whose logits have standard deviation 3, and whose student and teacher differ by about 1."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case.dtype]

        def noise(rows: int, scale: float) -> Tensor:
            return torch.empty(rows, case.hidden, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        hidden, weight = noise(case.tokens, 1.0), noise(case.vocab, 3 / math.sqrt(case.hidden))
        student_hidden = hidden + noise(case.tokens, 1 / 3)
        return cls(student_hidden.requires_grad_(), weight.clone().requires_grad_(), hidden, weight)


def ours(case: HeadCase, heads: Heads) -> Callable[[], Tensor]:
    student = LinearHead(heads.student_hidden, OutputHead(heads.student_weight))
    teacher = LinearHead(heads.teacher_hidden, OutputHead(heads.teacher_weight))
    weights = torch.full((case.tokens,), 1 / case.tokens, device=heads.student_hidden.device)
    tokens, spec, options = TokenTargets(weights), DivergenceSpec(case.beta), FusedLinearOptions()
    return lambda: fused_linear_divergence(student, teacher, tokens, spec, options=options)[0]


class _AsInTraining(Work):
    """The op as a step calls it: with labels, the factor of backward known before, and a `main_grad` in fp32."""

    def __init__(self, case: HeadCase, heads: Heads, error: Callable[[tuple[Tensor, Tensor]], float]) -> None:
        super().__init__(self._forward, self._backward, error=lambda: error((self._gradient, self._weight.main_grad)))
        device = heads.student_hidden.device
        self._hidden = heads.student_hidden
        self._weight = torch.nn.Parameter(heads.student_weight.detach())
        self._weight.main_grad = torch.zeros_like(self._weight, dtype=torch.float32)
        self._student = LinearHead(self._hidden, OutputHead(self._weight))
        self._teacher = LinearHead(heads.teacher_hidden, OutputHead(heads.teacher_weight))
        weights = torch.full((case.tokens,), 1 / case.tokens, device=device)
        self._tokens = TokenTargets(weights, torch.arange(case.tokens, device=device) % case.vocab)
        self._spec, self._options = DivergenceSpec(case.beta), FusedLinearOptions(upstream=1.0)
        self._value, self._gradient = None, None

    def _forward(self) -> None:
        self._value = fused_linear_divergence(
            self._student, self._teacher, self._tokens, self._spec, options=self._options
        )[0]

    def _backward(self) -> None:
        (self._gradient,) = torch.autograd.grad(self._value, (self._hidden,))

    def release(self) -> None:
        self._value = self._gradient = None


def liger(case: HeadCase, heads: Heads) -> Callable[[], Tensor]:
    if heads.student_hidden.device.type != "cuda":
        raise Unavailable("needs Triton and a GPU")
    installed("liger-kernel")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=case.beta)
    return lambda: jsd(*vars(heads).values(), None)


def liger_compiled(case: HeadCase, heads: Heads) -> Callable[[], Tensor]:
    """Liger's chunked loss, which runs the usual formula under torch.compile, without its cross-entropy."""
    installed("liger-kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=case.beta, chunk_size=CHUNK_TOKENS)
    labels = torch.zeros(case.tokens, dtype=torch.long, device=heads.student_hidden.device)
    order = (heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight)
    jsd(*order, labels)  # this compiles, the gradient too, which is made in the forward pass
    return lambda: jsd(*order, labels)


CONTESTANTS = {OURS: ours, "Liger fused linear JSD": liger, "Liger compiled JSD": liger_compiled}


def products(heads: Heads) -> Work:
    """The four products of each chunk of tokens, of our chunks' size, into buffers that are reused."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in vars(heads).values())
    rows = min(rows_within_budget(len(weight), hidden.dtype, hidden.device, buffers=2), len(hidden))
    student, teacher = (hidden.new_empty(rows, len(weight)) for _ in range(2))
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            count = len(hidden[chunk])
            torch.mm(teacher_hidden[chunk], teacher_weight.t(), out=teacher[:count])
            torch.mm(hidden[chunk], weight.t(), out=student[:count])
            torch.mm(student[:count], weight, out=hidden_gradient[chunk])
            torch.mm(student[:count].t(), hidden[chunk], out=weight_gradient)

    return Work(step)


def run_case(case: HeadCase, plan: Plan, stopwatch: Stopwatch) -> dict:
    """Measure one case, as ``divergence.run_case`` does, and check some gradients of hidden states and head."""
    heads = Heads.of(case, stopwatch.device)
    exact_hidden, exact_weight = _exact_gradient(case, heads), _exact_weight_gradient(case, heads)
    weight_errors: dict[str, float] = {}
    wanted = (heads.student_hidden, heads.student_weight)

    def checked(name: str) -> Callable[[tuple[Tensor, ...]], float]:
        def error(gradients: tuple[Tensor, ...]) -> float:
            weight_errors[name] = relative_error(gradients[1][:CHECKED_IDS], exact_weight)
            return relative_error(gradients[0][:CHECKED_ROWS], exact_hidden)

        return error

    builders = {
        name: lambda name=name, build=build: TrainingWork(build(case, heads), wanted, checked(name))
        for name, build in CONTESTANTS.items()
    }
    builders[TRAINING] = lambda: _AsInTraining(case, heads, checked(TRAINING))
    builders[PRODUCTS] = lambda: products(heads)
    result_bytes = sum(tensor.nbytes for tensor in wanted)
    found = compete(builders, plan, stopwatch)
    sizes = {"operations": case.operations, "result_bytes": result_bytes, "weight_errors": weight_errors}
    return {"case": str(case), **asdict(case), **sizes, **found}


def _exact_gradient(case: HeadCase, heads: Heads) -> Tensor:
    hidden = heads.student_hidden[:CHECKED_ROWS].detach().double().requires_grad_()
    student = hidden @ heads.student_weight.detach().double().t()
    teacher = heads.teacher_hidden[:CHECKED_ROWS].double() @ heads.teacher_weight.double().t()
    value = reference.divergence(student, teacher, beta=case.beta).sum() / case.tokens
    return torch.autograd.grad(value, hidden)[0]


def _exact_weight_gradient(case: HeadCase, heads: Heads) -> Tensor:
    """Return the gradient of the head's first rows in fp64, which every token adds to."""
    student_weight, teacher_weight = heads.student_weight.detach().double(), heads.teacher_weight.double()
    total = student_weight.new_zeros(CHECKED_IDS, case.hidden)
    for start in range(0, case.tokens, 256):
        rows = slice(start, start + 256)
        hidden = heads.student_hidden[rows].detach().double()
        student = (hidden @ student_weight.t()).requires_grad_()
        teacher = heads.teacher_hidden[rows].double() @ teacher_weight.t()
        value = reference.divergence(student, teacher, beta=case.beta).sum() / case.tokens
        total += torch.autograd.grad(value, student)[0][:, :CHECKED_IDS].t() @ hidden
    return total


def default_cases(device: torch.device) -> list[HeadCase]:
    if device.type == "cuda":
        return [HeadCase(8192, 3584, 151936)]
    return [HeadCase(256, 512, 32000, dtype="fp32")]
