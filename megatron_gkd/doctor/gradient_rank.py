"""One rank of the self-test: `python -m megatron_gkd.doctor.gradient_rank STORE RANKS BACKEND RANK`."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_gkd.doctor.gradient import SECONDS, Errors
from megatron_gkd.ops import DivergenceSpec, implementation, vocab_parallel_divergence
from megatron_gkd.ops.reference import divergence
from megatron_gkd.runtime import portability

TOKENS, VOCABULARY = 32, 1002  # the last shard has padding
BETAS = (0.0, 0.5, 1.0)


def compute_errors(rank: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device) -> Errors:
    """Compare the divergence of `ranks` shards with one process in fp64; all ranks must call it."""
    width = -(-VOCABULARY // ranks)
    generator = torch.Generator().manual_seed(1)
    whole = 3 * torch.randn(2, TOKENS, ranks * width, generator=generator, dtype=torch.float64)
    columns = slice(rank * width, (rank + 1) * width)
    value_error = gradient_error = 0.0
    for beta in BETAS:
        student = whole[0].float().double().requires_grad_()
        expected = divergence(student, whole[1].float().double(), beta=beta, vocab_size=VOCABULARY)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
        shard = whole[0, :, columns].float().to(device).requires_grad_()
        teacher = whole[1, :, columns].float().to(device)
        found = vocab_parallel_divergence(shard, teacher, DivergenceSpec(beta, group=group, vocab_size=VOCABULARY))
        (gradient,) = torch.autograd.grad(found.sum(), shard)
        value_error = max(value_error, _relative(found, expected))
        gradient_error = max(gradient_error, _relative(gradient, expected_gradient[:, columns]))
    return Errors(value_error, gradient_error, implementation(device))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected|; infinity where a number is not finite."""
    error = float((found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())
    return error if error < torch.inf else torch.inf


def main(store: str, ranks: str, backend: str, rank: str) -> None:
    """Join the other ranks, compare, and print the errors as JSON."""
    place = int(rank)
    device = torch.device("cpu")
    if backend == "nccl":
        portability.select_device(place)
        device = portability.device()
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=place,
        world_size=int(ranks),
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    errors = compute_errors(place, int(ranks), dist.group.WORLD, device)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(asdict(errors)))


if __name__ == "__main__":
    main(*sys.argv[1:])
