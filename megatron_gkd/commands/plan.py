"""The command that plans a run: what it needs of GPUs, before any process starts."""

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from megatron_gkd.commands.parts import Work, imports, load_recipe, take
from megatron_gkd.errors import CommandRefused, UserError
from megatron_gkd.planning.cluster import GB, Assumptions, Cluster
from megatron_gkd.planning.devices import find_device

if TYPE_CHECKING:
    from megatron_gkd.config.schema import Recipe


def plan(path: str, arguments: list[str], _: int) -> Work:
    """Print what a recipe needs on `--gpus` GPUs, whatever the number of processes that run."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.PLAN)
    cluster = _read_cluster(options)
    recipe = load_recipe(path, overrides, cluster.gpus, commands.PLANS)
    return lambda: _work(path, recipe, cluster, options)


def _read_cluster(options: dict[str, Any]) -> Cluster:
    gpus, node = options["gpus"], options["nodes-of"]
    if gpus > node and gpus % node:
        raise CommandRefused(f"--gpus = {gpus}: must be a multiple of --nodes-of ({node}), or fewer")
    try:
        device = find_device(options["device"])
    except UserError as error:
        raise CommandRefused(str(error)) from error
    return Cluster(gpus, node, device, options["gpu-memory"] or int(device.memory_gb * GB))


def _read_assumptions(options: dict[str, Any]) -> Assumptions:
    from megatron_gkd.config.byte_sizes import parse_bytes

    reserve = options["reserve"]
    return Assumptions(
        reserve=parse_bytes(reserve) if isinstance(reserve, str) else reserve,
        mfu=options["mfu"],
        bandwidth_efficiency=options["bandwidth-efficiency"],
    )


def _work(path: str, recipe: "Recipe", cluster: Cluster, options: dict[str, Any]) -> None:
    is_json = options["json"]
    with contextlib.redirect_stdout(sys.stderr) if is_json else contextlib.nullcontext():
        with contextlib.nullcontext() if is_json else imports():
            from megatron_gkd.planning.run import PlanRequest, run_plan
        request = PlanRequest(
            path=path,
            recipe=recipe,
            cluster=cluster,
            assumptions=_read_assumptions(options),
            label_fraction=options["label-fraction"],
            expert_imbalance=options["expert-imbalance"],
            suggestions=options["suggest"] or 0,
            measure_at_most=options["measure-at-most"],
        )
        result = run_plan(request, is_shown=not is_json)
    if is_json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        result.print()
