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

PRODUCTS = "four products"
CHECKED_ROWS = 4
CHUNK_TOKENS = 1024  # Liger's default too


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
    tokens, spec, options = TokenTargets(weights), DivergenceSpec(case.beta), FusedLinearOptions(CHUNK_TOKENS)
    return lambda: fused_linear_divergence(student, teacher, tokens, spec, options=options)[0]


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
    """The four products of each chunk of tokens, into buffers that are reused."""
    hidden, weight, teacher_hidden, teacher_weight = (x.detach() for x in vars(heads).values())
    rows = min(CHUNK_TOKENS, len(hidden))
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
    """Measure one case, as ``divergence.run_case`` does, and check the gradient of the hidden states."""
    heads = Heads.of(case, stopwatch.device)
    exact = _exact_gradient(case, heads)
    wanted = (heads.student_hidden, heads.student_weight)

    def prepare(build: Callable[[HeadCase, Heads], Callable[[], Tensor]]) -> Work:
        loss = build(case, heads)
        return TrainingWork(loss, wanted, lambda gradients: relative_error(gradients[0][:CHECKED_ROWS], exact))

    builders = {name: lambda build=build: prepare(build) for name, build in CONTESTANTS.items()}
    builders[PRODUCTS] = lambda: products(heads)
    result_bytes = sum(tensor.nbytes for tensor in wanted)
    found = compete(builders, plan, stopwatch)
    return {"case": str(case), **asdict(case), "operations": case.operations, "result_bytes": result_bytes, **found}


def _exact_gradient(case: HeadCase, heads: Heads) -> Tensor:
    hidden = heads.student_hidden[:CHECKED_ROWS].detach().double().requires_grad_()
    student = hidden @ heads.student_weight.detach().double().t()
    teacher = heads.teacher_hidden[:CHECKED_ROWS].double() @ heads.teacher_weight.double().t()
    value = reference.divergence(student, teacher, beta=case.beta).sum() / case.tokens
    return torch.autograd.grad(value, hidden)[0]


def default_cases(device: torch.device) -> list[HeadCase]:
    if device.type == "cuda":
        return [HeadCase(8192, 3584, 151936)]
    return [HeadCase(256, 512, 32000, dtype="fp32")]
