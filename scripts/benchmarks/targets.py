"""The targets that the loss is held to, one by one, against a run of ``loss.py``.

python scripts/benchmarks/targets.py runs/benchmarks/loss_*.json
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from benchmarks.head import PRODUCTS, TRAINING
from benchmarks.kernels import K1, K1_TRAINING, K2, K3, K3_LABELS
from benchmarks.measure import OURS
from benchmarks.report import Section, copy_rate, extra_bytes, headline, kernel_rate, ratio, share_of_copy

AT_LEAST, AT_MOST = operator.ge, operator.le
LARGE = {"tokens": 8192, "vocab": 151936, "tp": 1, "dtype": "bf16"}
LARGE_ON_CPU = {"tokens": 512, "vocab": 151936, "tp": 1, "dtype": "fp32", "beta": 0.5}


@dataclass(frozen=True)
class Target:
    text: str
    goal: float
    meets: Callable[[float, float], bool]  # AT_LEAST or AT_MOST
    measure: Callable[[dict], float | None]  # of a run; None where the run has no such figure
    form: str = "{:.2f}"

    def row(self, run: dict) -> tuple[str, str, str, str]:
        """Return text, goal, measured value and verdict."""
        goal = ("≥ " if self.meets is AT_LEAST else "≤ ") + self.form.format(self.goal)
        measured = self.measure(run)
        if measured is None:
            return self.text, goal, "", "not measured"
        if self.meets(measured, self.goal):
            return self.text, goal, self.form.format(measured), "met"
        return self.text, goal, self.form.format(measured), f"missed by {abs(measured / self.goal - 1):.0%}"


def _find(cases: list[dict], **wanted: object) -> dict | None:
    return next((case for case in cases if all(case.get(key) == value for key, value in wanted.items())), None)


def _of_case(figure: Callable[[dict], float | None], section: str, **wanted: object) -> Callable[[dict], float | None]:
    """Return the function that reads the figure of one case from a run; None where the run has no such case."""

    def measure(run: dict) -> float | None:
        case = _find(run.get(section, []), **wanted)
        return None if case is None else figure(case)

    return measure


def _kernel_share(case: dict, kernel: str) -> float | None:
    rate = kernel_rate(case, kernel) if kernel in case["contestants"] else None
    return None if rate is None else rate / copy_rate(case)


def _extra_memory_share(case: dict) -> float | None:
    mine, eager = extra_bytes(case, OURS), extra_bytes(case, "eager torch")
    return None if mine is None or not eager else mine / eager


def _times_slower(peer: str) -> Callable[[dict], float | None]:
    return partial(ratio, name=peer, base=OURS)


GPU = [
    *(
        Target(
            f"{kernel}, share of a copy's bandwidth",
            goal,
            AT_LEAST,
            _of_case(partial(_kernel_share, kernel=kernel), "kernels", **LARGE, beta=0.5),
        )
        for kernel, goal in ((K1, 0.90), (K1_TRAINING, 0.90), (K2, 0.85), (K3, 0.90), (K3_LABELS, 0.90))
    ),
    *(
        Target(
            f"forward and backward at β {beta:g}, share of a copy's bandwidth",
            0.82,
            AT_LEAST,
            _of_case(partial(share_of_copy, name=OURS), "divergence", **LARGE, beta=beta),
        )
        for beta in (0.5, 0.0, 1.0)
    ),
    *(
        Target(
            f"times as fast as {peer}, β 0.5",
            10.0,
            AT_LEAST,
            _of_case(_times_slower(peer), "divergence", **LARGE, beta=0.5),
        )
        for peer in ("Liger JSD", "ms-swift")
    ),
    Target(
        "fused head as in training over its four products, H = 3584",
        1.2,
        AT_MOST,
        _of_case(partial(ratio, name=TRAINING, base=PRODUCTS), "head", hidden=3584, vocab=151936, dtype="bf16"),
    ),
]
CPU = [
    Target(
        "times as fast as eager torch, 512 × 151936 in fp32",
        6.0,
        AT_LEAST,
        _of_case(_times_slower("eager torch"), "divergence", **LARGE_ON_CPU),
    ),
    Target(
        "extra memory over that of eager torch",
        0.01,
        AT_MOST,
        _of_case(_extra_memory_share, "divergence", **LARGE_ON_CPU),
        form="{:.2%}",
    ),
]


def section(run: dict) -> Section:
    targets = GPU if run["environment"]["device_type"] == "cuda" else CPU
    return Section(headline(run), ("target", "goal", "measured", "verdict"), [target.row(run) for target in targets])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files that loss.py wrote")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for path in parser.parse_args().runs:
        console.print(section(json.loads(path.read_text())).rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())
