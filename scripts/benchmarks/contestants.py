"""The implementations of the divergence that are compared. Each is built for a case and a device, or is Unavailable.

A contestant is a function of (student logits [N, V] that want a gradient, teacher logits [N, V]): the mean over the
tokens of the divergence at temperature 1, a scalar. All of them divide by N themselves, since one at least of the peers
does, and its gradient skips a pass where the loss is used as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import OURS
from benchmarks.peers import Unavailable, definitions, installed
from megatron_gkd.ops import DivergenceSpec, vocab_parallel_divergence

Loss = Callable[[Tensor, Tensor], Tensor]
Builder = Callable[[Case, torch.device], Loss]


def ours(case: Case, device: torch.device) -> Loss:
    spec = DivergenceSpec(case.beta)
    return lambda student, teacher: vocab_parallel_divergence(student, teacher, spec).mean()


def usual_formula(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """D [N] as it is written down: log-softmax of both in fp32, mixture, sums."""
    a, b = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if beta == 0:
        return (b.exp() * (b - a)).sum(-1)
    if beta == 1:
        return (a.exp() * (a - b)).sum(-1)
    p, q = a.exp(), b.exp()
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (b - log_m)).sum(-1) + (1 - beta) * (p * (a - log_m)).sum(-1)


def eager(case: Case, device: torch.device) -> Loss:
    return lambda student, teacher: usual_formula(student, teacher, case.beta).mean()


def compiled(case: Case, device: torch.device) -> Loss:
    torch._dynamo.reset()  # else the ninth shape would silently run eagerly
    function = torch.compile(usual_formula, dynamic=False)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return function(student, teacher, case.beta).mean()

    loss(*case.inputs(device)).backward()  # this compiles
    return loss


def liger(case: Case, device: torch.device) -> Loss:
    """Liger Kernel's JSD of log-probabilities, which it is given in fp32, as its own fused linear JSD does."""
    if device.type != "cuda":
        raise Unavailable("needs Triton and a GPU")
    package = installed("liger-kernel")
    try:
        from liger_kernel.transformers.jsd import LigerJSD
    except ImportError as error:
        raise Unavailable(f"{package.version} can't be imported: {error}") from error
    jsd = LigerJSD(beta=case.beta)
    return lambda student, teacher: jsd(student.float().log_softmax(-1), teacher.float().log_softmax(-1))


def trl(case: Case, device: torch.device) -> Loss:
    """TRL's loss of its GKD trainer, which works in the type of the logits."""
    gkd = definitions(
        installed("trl"), "trl/experimental/gkd/gkd_trainer.py", "GKDTrainer.generalized_jsd_loss", F=F, torch=torch
    )
    return lambda student, teacher: gkd.generalized_jsd_loss(student, teacher, beta=case.beta)


def ms_swift(case: Case, device: torch.device) -> Loss:
    """ms-swift's loss of its Megatron GKD trainer, which works in the type of the logits.

    Where the case stands for a shard, ms-swift's code for tensor parallelism runs, in a group of one rank.
    """
    group = None if case.tp == 1 else _group_of_one(device)
    loss = swift_loss(installed("ms-swift"), case.beta, ranks=case.tp, group=group)
    return lambda student, teacher: loss(student, teacher) / len(student)


def swift_loss(package: metadata.Distribution, beta: float, *, ranks: int, group: dist.ProcessGroup | None) -> Loss:
    """ms-swift's sum of the divergence over tokens, in a process that takes itself for one of `ranks` in `group`."""
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: ranks, get_tensor_model_parallel_group=lambda: group
    )
    parallel = definitions(package, "swift/megatron/trainers/vocab_parallel_utils.py", mpu=mpu)
    gkd = definitions(package, "swift/rlhf_trainers/gkd_loss.py")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.zeros(1, len(student), dtype=torch.long, device=student.device)  # every token counts
        total, _ = gkd.gkd_loss(
            student[None],
            gkd.TeacherOutput(full_logits=teacher[None]),
            labels,
            beta,
            1.0,
            log_softmax_fn=parallel.vocab_parallel_log_softmax,
            kl_div_fn=parallel.vocab_parallel_kl_div,
        )
        return total

    return loss


def _group_of_one(device: torch.device) -> dist.ProcessGroup:
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


CONTESTANTS: dict[str, Builder] = {
    OURS: ours,
    "eager torch": eager,
    "torch.compile": compiled,
    "Liger JSD": liger,
    "TRL": trl,
    "ms-swift": ms_swift,
}
