"""Steps whose loss or gradient is not finite, and which change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.mesh import Mesh


class BadSteps:
    """Record the steps whose loss or gradient norm is not finite, and end a run that has too many in a row.

    Args:
        folder: gets `step_000012.json` for each bad step, with its loss, gradient norm and rows.
        max_in_a_row: recipe key `train.max_bad_steps`.

    Attributes:
        in_a_row: number of bad steps since the last update; the caller resets it.
    """

    def __init__(self, folder: Path, max_in_a_row: int) -> None:
        self.folder, self.max_in_a_row = folder, max_in_a_row
        self.in_a_row = 0

    def record(
        self, step: int, loss: float, grad_norm: float | None, microbatches: Sequence[Microbatch], mesh: Mesh
    ) -> None:
        """Write the rows of a bad step. All ranks must call it.

        Raises:
            UserError: there are `max_in_a_row` bad steps in a row, or the file can't be written.
        """
        self.in_a_row += 1
        rows = _rows_of_global_batch(microbatches, mesh)
        path = self.folder / f"step_{step:06d}.json"
        # as text, since JSON has no NaN and infinities
        measured = {"loss": str(loss), "grad_norm": None if grad_norm is None else str(grad_norm)}

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, **measured, "rows": rows}) + "\n", encoding="utf-8")

        run_on_main(write, os_error=f"{path}: can't be written")
        if self.in_a_row >= self.max_in_a_row:
            what = "loss" if grad_norm is None else "gradient's norm"
            raise UserError(
                f"step {step}: the {what} is not finite, for {self.in_a_row} steps in a row (train.max_bad_steps = "
                f"{self.max_in_a_row}). Their rows are in {self.folder}; look for a learning rate that is too "
                "high, or for broken weights, teacher scores or rows"
            )


def _rows_of_global_batch(microbatches: Sequence[Microbatch], mesh: Mesh) -> list[dict[str, int | str]]:
    mine = [
        {"row": sample.row_id, "source": sample.source}
        for microbatch in microbatches
        for sample in microbatch.samples
        if sample.row_id >= 0
    ]
    everything: list[list[dict]] = [[] for _ in range(mesh.dp.size())]
    dist.all_gather_object(everything, mine, group=mesh.dp)
    return [row for part in everything for row in part]
