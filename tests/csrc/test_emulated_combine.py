"""The GPU's kernels that combine the ranks' numbers, run by the emulator: the same bits as the CPU's."""

from ctypes import Structure, byref, c_bool, c_float, c_int, c_int64, c_void_p

import pytest
import torch
from csrc.emulated_kernels import TYPES, address, build_library

SOURCES = ("csrc/cuda/combine.cu", "csrc/cpu/combine.cpp", "tests/csrc/emulated_combine.cpp")
ROWS, RANKS = 300, 3  # more rows than a block has threads, and no multiple


class LabelLogitParams(Structure):
    _fields_ = [
        ("student", c_void_p),
        *((name, c_int64) for name in ("stride", "rows", "columns")),
        ("type", c_int),
        ("first", c_int64),
        *((name, c_void_p) for name in ("label", "out")),
    ]


class CombineParams(Structure):
    _fields_ = [
        ("gathered", c_void_p),
        *((name, c_int64) for name in ("ranks", "rank_stride", "rows")),
        ("columns", c_int),
        *((name, c_bool) for name in ("has_teacher", "moments")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("mask", "label")),
        *((name, c_int64) for name in ("first", "valid")),
        ("source", c_int),
        *((name, c_void_p) for name in ("token_weight", "label_weight")),
        ("factor", c_float),
        *((name, c_void_p) for name in ("normalizers", "metrics", "loss", "slope_sum", "weight")),
        *((name, c_void_p) for name in ("untempered", "scaled_label_weight", "label_column")),
    ]


class CombineSumsParams(Structure):
    _fields_ = [
        ("gathered", c_void_p),
        *((name, c_int64) for name in ("ranks", "rows")),
        *((name, c_void_p) for name in ("token_weight", "metrics", "loss", "slope_sum")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("emulated_combine") / "library.so", SOURCES)


@pytest.mark.parametrize("dtype", TYPES)
def test_logits_of_labels(library, dtype):
    logits = (torch.arange(ROWS * 9).reshape(ROWS, 9) * 0.37 - 400).to(dtype)
    logits[0, :6] = torch.tensor([torch.inf, -torch.inf, 6e-8, -0.0, 6e-5, -1.5])  # 6e-8 is subnormal in fp16
    labels = torch.arange(ROWS) % 9 + 98
    labels[:6] = torch.arange(6) + 100
    logits[:6] = logits[0]
    expected = torch.full((ROWS,), -torch.inf)
    here = (labels >= 100) & (labels < 107)
    expected[here] = logits[here, labels[here] - 100].float()
    for device in ("cuda", "cpu"):
        out = torch.full((ROWS,), torch.nan)
        arguments = logits.data_ptr(), logits.stride(0), ROWS, 7, TYPES.index(dtype), 100
        getattr(library, f"{device}_label_logits")(
            byref(LabelLogitParams(*arguments, labels.data_ptr(), out.data_ptr()))
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("source", "has_teacher", "has_labels"), [(0, True, True), (1, True, True), (2, True, False)])
def test_statistics(library, source, has_teacher, has_labels):
    columns = 10 + has_labels if has_teacher else 4
    generator = torch.Generator().manual_seed(0)
    gathered = torch.rand(RANKS, ROWS * (columns + has_labels), generator=generator)
    labels = torch.arange(ROWS) - 3 if has_labels else None
    mask = torch.arange(ROWS) % 5 > 0
    weights = torch.rand(2, ROWS, generator=generator)
    found = []
    for device in ("cuda", "cpu"):
        outs = [torch.full(shape, -7.0) for shape in ((ROWS, 4), (ROWS, 7), (ROWS,), (ROWS,), (ROWS,))]
        of_labels = [torch.full((2, ROWS), -7.0), torch.full((ROWS,), -7.0), torch.full((ROWS,), -7)]
        rows = RANKS, gathered.shape[1], ROWS, columns, has_teacher, True
        of_shard = address(mask), address(labels), 10, 50, source
        of_loss = weights[0].data_ptr(), weights[1].data_ptr(), 2.0
        params = CombineParams(gathered.data_ptr(), *rows, 1.3, *of_shard, *of_loss)
        fields = [name for name, _ in CombineParams._fields_[-8:]]
        for name, out in zip(fields, outs + (of_labels if has_labels else [None] * 3), strict=True):
            setattr(params, name, address(out))
        getattr(library, f"{device}_combine_statistics")(byref(params))
        found.append((*outs, *of_labels))
    for number, (actual, expected) in enumerate(zip(*found, strict=True)):
        assert torch.equal(actual, expected), fields[number]
    normalizers, metrics, loss, slope_sum, weight, *_ = found[0]
    written = [normalizers, metrics, loss, weight] + [slope_sum] * (source > 0) + [*found[0][5:]] * has_labels
    assert all((out != -7).any(-1).all() if out.dim() > 1 else (out != -7).all() for out in written)
    assert not metrics[~mask][:, 2:].any()


def test_sums(library):
    gathered = torch.rand(RANKS, ROWS, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(ROWS, dtype=torch.float32) % 4
    gathered[1, ::4] = torch.inf
    for device in ("cuda", "cpu"):
        metrics, loss, slope_sum = torch.ones(ROWS, 7), torch.ones(ROWS), torch.ones(ROWS)
        outs = metrics.data_ptr(), loss.data_ptr(), slope_sum.data_ptr()
        getattr(library, f"{device}_combine_sums")(
            byref(CombineSumsParams(gathered.data_ptr(), RANKS, ROWS, weight.data_ptr(), *outs))
        )
        exact = gathered.double().sum(0).float()
        assert torch.equal(slope_sum, exact[:, 1]) and torch.equal(metrics[:, 0], exact[:, 0])
        assert (metrics[:, 1:] == 1).all()
        expected = 1 + torch.where(weight == 0, 0, weight * exact[:, 0])
        torch.testing.assert_close(loss, expected)
