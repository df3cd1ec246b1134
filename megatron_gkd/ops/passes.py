"""The passes over logits of which every loss here consists, by compiled kernels or in plain torch.

    statistics   one read of both logits: maxima, sums of exponentials, moments   then one collective
    sums         one read: value and slope of the divergence                      then one collective
    gradient     one read, one write                                              no collective

Without a teacher: ``student_statistics`` and ``cross_entropy_gradient``, which read the student's logits only.
``softcap`` comes before them where a head has one: one read, one write.
``csrc/params.h`` documents their columns, and ``combine`` combines the numbers of the ranks. The environment
variable MEGATRON_GKD_IMPL chooses the implementation: auto (compiled where there are kernels for the tensor, else
torch), torch, or compiled (an error where there are no kernels). MEGATRON_GKD_CLUSTER=1 lets thread block clusters
share rows on GPUs that have them (sm_90 and later): ``loss`` then does all passes in one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from megatron_gkd.errors import UserError
from megatron_gkd.ops import torch_passes
from megatron_gkd.ops.params import DivergenceRows, LabelRows, Logits, LossSums, LossWeights
from megatron_gkd.ops.spec import ShardSpec

_CHOICES = ("auto", "torch", "compiled")
_FUNCTIONS = (
    *("statistics", "student_statistics", "sums", "gradient", "cross_entropy_gradient", "softcap", "loss"),
    *("token_statistics", "combine_statistics", "combine_sums"),
    *(f"top_k_{name}" for name in ("select", "merge", "statistics", "sums", "combine", "gradient")),
)


def _load(choice: str) -> ModuleType | None:
    """Return the module of kernels, or None where plain torch is used."""
    if choice not in _CHOICES:
        raise UserError(f"MEGATRON_GKD_IMPL = {choice!r}: must be one of {', '.join(_CHOICES)}")
    if choice == "torch":
        return None
    try:
        return import_kernels()
    except ImportError as error:
        how = "build them with: pip install --no-build-isolation -e ."
        if choice == "compiled":
            raise UserError(f"MEGATRON_GKD_IMPL = compiled: there are no compiled kernels ({error}); {how}") from error
        warnings.warn(f"no compiled kernels ({error}), so the loss is computed in plain torch; {how}", stacklevel=2)
        return None


def import_kernels() -> ModuleType:
    """Import the kernels, and reject a build of an older version, which an editable install can leave behind."""
    kernels = importlib.import_module("megatron_gkd._C")
    missing = [name for name in _FUNCTIONS if not hasattr(kernels, name)]
    if missing:
        raise ImportError(f"megatron_gkd._C was built from other sources: it has no {', '.join(missing)}")
    return kernels


_kernels = _load(os.environ.get("MEGATRON_GKD_IMPL", "auto"))


def _read_switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise UserError(f"{name} = {value!r}: must be 0 or 1")
    return value == "1"


_uses_clusters = _read_switch("MEGATRON_GKD_CLUSTER")
if _uses_clusters and _kernels is not None and _kernels.has_cuda:
    _kernels.use_clusters(True)


def uses_clusters() -> bool:
    """Return whether thread block clusters may share rows; see MEGATRON_GKD_CLUSTER."""
    return _uses_clusters


def implementation(device: torch.device | str = "cpu") -> str:
    """Return which implementation computes on 16- and 32-bit logits on `device`: "torch" or "compiled (...)"."""
    device = torch.device(device)
    kernels = kernels_on(device)
    if kernels is None:
        return "torch"
    return f"compiled ({kernels.cpu_capability()})" if device.type == "cpu" else "compiled (CUDA)"


def kernels_on(device: torch.device) -> ModuleType | None:
    """Return the kernels for a device; None where plain torch is used."""
    if _kernels is not None and (device.type == "cpu" or (device.type == "cuda" and _kernels.has_cuda)):
        return _kernels
    return None


def kernels_for(logits: Tensor) -> ModuleType | None:
    """Return the kernels for logits, or for statistics of them; None where plain torch is used."""
    return None if logits.dtype == torch.float64 else kernels_on(logits.device)


def statistics(logits: Logits, spec: ShardSpec, *, moments: bool, untempered: bool = False) -> Tensor:
    """Return the statistics of each row over this rank's columns, [N, 4 (+ 6 with moments) (+ 1 untempered)].

    Args:
        logits: of both models. Rows outside the mask get what adds nothing.
        spec: the temperature and the shard.
        moments: also compute what the KL divergences and ``TokenStatistics`` need.
        untempered: also compute the student's sum of exponentials at temperature 1, which the cross-entropy needs.
    """
    kernels = kernels_for(logits.student)
    if kernels is None:
        return torch_passes.statistics(logits, spec, moments=moments, untempered=untempered)
    return kernels.statistics(*logits, spec.temperature, spec.shard.first, moments, untempered)


def student_statistics(student_NV: Tensor, spec: ShardSpec) -> Tensor:
    """Return the student's part of ``statistics``, [N, 4]: maximum, sum, moment, and sum at temperature 1."""
    kernels = kernels_for(student_NV)
    if kernels is None:
        return torch_passes.student_statistics(student_NV, spec)
    return kernels.student_statistics(student_NV, spec.temperature)


def sums(logits: Logits, normalizers_N4: Tensor, spec: ShardSpec) -> Tensor:
    """Return the sums of values and slopes over this rank's columns, [N, 2]; 0 outside the mask."""
    kernels = kernels_for(logits.student)
    if kernels is None:
        return torch_passes.sums(logits, normalizers_N4, spec)
    return kernels.sums(*logits, normalizers_N4, spec.divergence.name, spec.beta, spec.temperature)


def gradient(out: Tensor, logits: Logits, rows: DivergenceRows, labels: LabelRows | None, spec: ShardSpec) -> None:
    """Write the gradient of sum_n (rows.weight[n] D_n + labels.weight[n] CE_n) by the student's logits into `out`.

    Args:
        out: [N, >= V], which may be the logits themselves. Columns from V on become 0, and so do rows whose weights
            are 0, whatever their logits hold.
        logits: of both models. Their mask is not used.
        rows: what the divergence D needs of each row.
        labels: what the cross-entropy CE needs of each row; None leaves it out.
        spec: the divergence, its temperature, the shard and the softcap.
    """
    kernels = kernels_for(logits.student)
    if kernels is None:
        torch_passes.gradient(out, logits, rows, labels, spec)
        return
    divergence = spec.divergence.name, spec.beta, spec.temperature
    label_rows = labels or (None, None, None)
    kernels.gradient(out, logits.student, logits.teacher, *rows, *label_rows, *divergence, spec.softcap)


def loss(out: Tensor, logits: Logits, labels: Tensor | None, weights: LossWeights, spec: ShardSpec) -> LossSums | None:
    """Compute ``combine.token_statistics`` with moments, ``sums`` and ``gradient`` in one read and one write.

    Args:
        out: as in ``gradient``.
        logits: of both models, over the whole vocabulary. Their mask is not used.
        labels: int64 [N], global ids; None without a cross-entropy.
        weights: the gradients of the loss by each token's losses.
        spec: the divergence and its temperature.

    Returns:
        None, and nothing is done, where rows cannot be kept on chip: without MEGATRON_GKD_CLUSTER=1, where ranks share
        the vocabulary, with a softcap, or on a device, or for a dtype or width of rows, for which there is no kernel.
    """
    kernels = kernels_for(logits.student)
    is_shared = spec.shard.group is not None and spec.shard.group.size() > 1
    if not uses_clusters() or kernels is None or is_shared or spec.softcap is not None:
        return None
    divergence = spec.divergence.name, spec.beta, spec.temperature
    found = kernels.loss(out, logits.student, logits.teacher, *weights, labels, *divergence)
    return None if found is None else LossSums(*found)


def cross_entropy_gradient(out: Tensor, student_NV: Tensor, labels: LabelRows, softcap: float | None = None) -> None:
    """Write the gradient of sum_n labels.weight[n] CE_n by the student's logits into `out`, as ``gradient`` does.

    `softcap` is that of the student's logits; see ``ShardSpec``.
    """
    kernels = kernels_for(student_NV)
    if kernels is None:
        torch_passes.cross_entropy_gradient(out, student_NV, labels, softcap)
    else:
        kernels.cross_entropy_gradient(out, student_NV, *labels, softcap)


def softcap(logits_NV: Tensor, cap: float) -> None:
    """Bound logits in place: each becomes cap tanh(z / cap), computed in fp32 (fp64 for fp64)."""
    kernels = kernels_for(logits_NV)
    if kernels is None:
        torch_passes.softcap(logits_NV, cap)
    else:
        kernels.softcap(logits_NV, cap)
