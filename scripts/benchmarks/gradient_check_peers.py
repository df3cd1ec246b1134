"""Is the gradient right under tensor parallelism? Ours and other packages' divergence on two processes.

    python scripts/benchmarks/gradient_check_peers.py
    pip install --no-deps --target old ms-swift==4.5.0 && python scripts/benchmarks/gradient_check_peers.py --site old

Two gloo processes each hold half of a vocabulary; their halves of the gradient are put together and compared with that
of the unsharded fp64 oracle, as is the loss. A loss can be right while its gradient is not: autograd does not see what
a plain all_reduce does. Peers are read out of the installed packages' files; --site adds folders made by `pip install
--target`, so that several versions of a package can stand beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from torch import Tensor

from benchmarks.contestants import swift_loss
from benchmarks.environment import describe, file_stem
from benchmarks.measure import OURS, relative_error
from benchmarks.peers import Unavailable, definitions, installed
from benchmarks.report import Section
from megatron_gkd.ops import DivergenceSpec, reference, vocab_parallel_divergence

RANKS = 2
TOKENS, COLUMNS = 64, 4096
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

# A sum over the tokens of this rank's shards (student, teacher), for autograd.
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(beta: float) -> Loss:
    spec = DivergenceSpec(beta, group=dist.group.WORLD)
    return lambda student, teacher: vocab_parallel_divergence(student, teacher, spec).sum()


def plain_all_reduce(beta: float) -> Loss:
    """Build the loss as it is often written: a log-softmax whose sum is all-reduced in place, under autograd."""

    def log_softmax(z: Tensor) -> Tensor:
        maximum = z.detach().amax(-1, keepdim=True)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        total = (z - maximum).exp().sum(-1, keepdim=True)
        dist.all_reduce(total.data)
        return z - maximum - total.log()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value = reference.divergence_at(beta).value(log_softmax(student), log_softmax(teacher), beta).sum(-1)
        dist.all_reduce(value.data)
        return value.sum()

    return loss


def ms_swift(package: metadata.Distribution, beta: float) -> Loss:
    return swift_loss(package, beta, ranks=RANKS, group=dist.group.WORLD)


def modelopt(package: metadata.Distribution, beta: float) -> Loss:
    """Build NVIDIA Model Optimizer's loss for Megatron: KL(T||S) or, reversed, KL(S||T).

    Its caller adds up the ranks' losses by a reduction that leaves the gradient alone.
    """
    if beta not in (0.0, 1.0):
        raise Unavailable("β 0 and 1 only")
    parallel_state = SimpleNamespace(get_tensor_model_parallel_group=lambda: dist.group.WORLD)
    path = "modelopt/torch/distill/plugins/megatron.py"
    found = definitions(package, path, "BaseLoss", "LogitsKLLoss", parallel_state=parallel_state)
    function = found.LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=RANKS), reverse=beta == 1.0)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        value = function(student[:, None], teacher[:, None])[0].sum()
        dist.all_reduce(value.data)
        return value

    return loss


def verl(package: metadata.Distribution, beta: float) -> Loss:
    """Verl's KL(T||S) over the teacher's top-k, which is the whole one for k = V. It needs megatron-core."""
    if beta != 0.0:
        raise Unavailable("β 0 only")
    try:
        from megatron.core import parallel_state
    except ImportError:
        raise Unavailable("needs megatron-core") from None
    path = "verl/trainer/distillation/megatron/losses.py"
    found = definitions(package, path, "vocab_parallel_log_softmax", "_VocabParallelKLDivergence")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
        shards = [torch.empty_like(teacher) for _ in range(RANKS)]
        dist.all_gather(shards, teacher)
        log_probs = torch.cat(shards, -1).log_softmax(-1)
        ids = torch.arange(log_probs.shape[-1]).expand_as(log_probs)
        return found._VocabParallelKLDivergence.apply(student[None], log_probs[None], ids[None], None)[0].sum()

    return loss


PEERS = {"ms-swift": ms_swift, "nvidia-modelopt": modelopt, "verl": verl}


def builders(sites: list[str]) -> dict[str, Callable[[float], Loss]]:
    """Return the contestants by name: every version of a peer that sys.path and `sites` have."""
    found: dict[str, Callable[[float], Loss]] = {OURS: ours, "plain all_reduce": plain_all_reduce}
    for name, build in PEERS.items():
        versions = {}
        for folders in (None, *([site] for site in sites)):
            try:
                package = installed(name, folders)
            except Unavailable as missing:
                versions.setdefault(name, partial(_unavailable, missing))
            else:
                versions[f"{name} {package.version}"] = partial(build, package)
        if len(versions) > 1:
            versions.pop(name, None)  # it is in one place, if not in all
        found |= versions
    return found


def _unavailable(missing: Unavailable, beta: float) -> Loss:
    raise missing


def inputs() -> tuple[Tensor, Tensor]:
    """Return fp32 logits of student and teacher over the whole vocabulary: different, but not wildly."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = (torch.randn(TOKENS, COLUMNS, generator=generator) for _ in range(2))
    return 3 * teacher + noise, 3 * teacher


def run_rank(rank: int, rendezvous: str, sites: list[str], betas: tuple[float, ...], folder: str) -> None:
    """Save what this rank found: {contestant: {beta: (loss, gradient of its shard) or the reason why not}}."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' deprecations; what they amount to is measured here
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    results: dict[str, dict[float, tuple[Tensor, Tensor] | dict[str, str]]] = {}
    for name, build in builders(sites).items():
        for beta in betas:
            student, teacher = (x.chunk(RANKS, -1)[rank].clone() for x in inputs())
            student.requires_grad_()
            try:
                value = build(beta)(student, teacher)
                value.backward()
                found = value.detach(), student.grad
            except Unavailable as missing:
                found = {"reason": missing.reason, "install": missing.install}
            results.setdefault(name, {})[beta] = found
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def check(sites: list[str], betas: tuple[float, ...] = BETAS) -> list[dict]:
    """Return for each contestant and beta the cosine and relative error of the whole gradient, and the loss error."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/rendezvous", sites, betas, folder)
        multiprocessing.spawn(run_rank, arguments, nprocs=RANKS)
        by_rank = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]
    records = []
    for beta in betas:
        student, teacher = (x.double() for x in inputs())
        student.requires_grad_()
        expected = reference.divergence(student, teacher, beta=beta).sum()
        expected.backward()
        for name, found in by_rank[0].items():
            record = {"contestant": name, "beta": beta}
            if isinstance(found[beta], dict):
                records.append(record | found[beta])
                continue
            gradient = torch.cat([results[name][beta][1] for results in by_rank], -1).double()
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), student.grad.flatten(), 0).item()
            loss_error = abs(found[beta][0].item() / expected.item() - 1)
            error = relative_error(gradient, student.grad)
            records.append(record | {"cosine": cosine, "gradient_error": error, "loss_error": loss_error})
    return records


def section(records: list[dict]) -> Section:
    """Return the table: a row for each measurement, or one with the reason for a contestant without any."""
    rows = []
    for name in dict.fromkeys(record["contestant"] for record in records):
        mine = [record for record in records if record["contestant"] == name]
        measured = [record for record in mine if "cosine" in record]
        rows += [_cells(record) for record in measured or mine[:1]]
    title = f"TP {RANKS}, {TOKENS} tokens × {COLUMNS} columns, fp32, against the unsharded fp64 gradient"
    return Section(title, ("contestant", "β", "cosine", "gradient error", "loss error"), rows)


def _cells(record: dict) -> list[str]:
    if "cosine" not in record:
        return [": ".join(filter(None, (record["contestant"], record["reason"], record["install"]))), "", "", "", ""]
    errors = (f"{record[key]:.1e}" for key in ("gradient_error", "loss_error"))
    return [record["contestant"], f"{record['beta']:g}", f"{record['cosine']:.6f}", *errors]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", action="append", default=[], help="a folder with packages; may be repeated")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--output", type=Path, help="a folder for the figures as JSON and Markdown")
    options = parser.parse_args()
    records = check(options.site, tuple(options.betas))
    Console(width=None if sys.stdout.isatty() else 140).print(section(records).rich())
    if options.output:
        environment = describe(torch.device("cpu"))
        stem = options.output / file_stem("gradient_check_peers", environment)
        stem.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment, "records": records}, indent=1)
        stem.with_suffix(".json").write_text(text + "\n")
        stem.with_suffix(".md").write_text(section(records).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
