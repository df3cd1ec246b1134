"""Logits at chosen places in memory, and logits that are hard to handle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Elements before a tensor's first row, from a multiple of 16 bytes on, and between the rows beyond their width
    rounded up to a multiple of 8."""

    offset: int
    gap: int

    def place(self, values: Tensor, dtype: torch.dtype, *, around: float = torch.nan) -> Tensor:
        """Return a view [N, V] of `values`, in a buffer that holds `around` elsewhere."""
        rows, columns = values.shape
        stride = -(-columns // 8) * 8 + self.gap
        buffer = torch.full((self.offset + rows * stride + 8,), around, dtype=dtype)
        assert buffer.data_ptr() % 16 == 0
        view = buffer.as_strided((rows, columns), (stride, 1), self.offset)
        view.copy_(values)
        return view


# Of student and teacher, and of the gradient's output.
LAYOUTS = {
    "aligned": (Layout(0, 0), Layout(8, 16), Layout(0, 8)),
    "alike": (Layout(3, 1), Layout(11, 9), Layout(3, 1)),  # each row starts elsewhere, but all tensors' do so alike
    "bases apart": (Layout(1, 0), Layout(4, 0), Layout(1, 0)),
    "strides apart": (Layout(0, 0), Layout(0, 3), Layout(0, 0)),
    "output apart": (Layout(0, 0), Layout(0, 0), Layout(0, 1)),
}


def elements_around(view: Tensor) -> Tensor:
    """Return a copy of everything in the view's buffer that is not the view."""
    outside = torch.ones(view.untyped_storage().nbytes() // view.element_size(), dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return view.as_strided(outside.shape, (1,), 0)[outside]


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return related logits of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, rows, columns, generator=generator) * scale
    return student, student + 0.5 * noise


def hard_logits(columns: int = 5000) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows with special values, for student and teacher, by what is special about them."""
    cases = {}

    def case(name: str) -> tuple[Tensor, Tensor]:
        cases[name] = tuple(x[0].clone() for x in random_logits(1, columns, seed=len(cases)))
        return cases[name]

    both = case("-inf at the same places")
    for x in both:
        x[::3] = -torch.inf
        x[2048:4096] = -torch.inf
    case("-inf in the student only")[0][5::7] = -torch.inf
    case("-inf in the teacher only")[1][5::7] = -torch.inf
    case("-inf from the start on")[0][:4999] = -torch.inf
    case("the student is all -inf")[0].fill_(-torch.inf)
    case("the teacher is all -inf")[1].fill_(-torch.inf)
    for x in case("both are all -inf"):
        x.fill_(-torch.inf)
    case("NaN in the student")[0][1234] = torch.nan
    case("NaN in the teacher")[1][4321] = torch.nan
    case("all NaN")[0].fill_(torch.nan)
    case("+inf")[1][77] = torch.inf
    student, teacher = case("-inf in the teacher, where the student has next to nothing")
    student -= 300
    student[0], teacher[100:3000] = 0, -torch.inf
    student, teacher = case("far apart")
    student[::2], student[1::2], teacher[::2], teacher[1::2] = 1e4, -1e4, -1e4, 1e4
    student, teacher = case("one-hot")
    student.fill_(-1e4), teacher.fill_(-1e4)
    student[17], teacher[4999] = 1e4, 1e4
    student, teacher = case("rising")  # the reference has to follow all the time
    student[:], teacher[:] = torch.linspace(-300, 300, columns), torch.linspace(500, -500, columns)
    student, teacher = case("ties")
    student.clamp_(max=1.0), teacher.clamp_(max=0.5)
    student, teacher = case("a tie between threads")
    student[[4000, 2050, 3]], teacher[[4999, 2049, 2048, 2056]] = 100.0, 100.0
    case("equal")[1].copy_(cases["equal"][0])
    for x in case("all zero"):
        x.fill_(0)
    return cases
