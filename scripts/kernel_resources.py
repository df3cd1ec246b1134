"""What GPU kernels use, from ptxas' verbose reports: python scripts/kernel_resources.py REPORT...

Prints a table; exits with 1 if a kernel spills registers or has a stack frame, or if the reports name no kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'")
_STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<shared>\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    symbol: str
    architecture: str
    registers: int
    shared: int  # the rest are bytes
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def keeps_to_registers(self) -> bool:
        return self.stack == self.spill_stores == self.spill_loads == 0


def parse(report: str) -> list[Kernel]:
    """Return the kernels of one or several reports, in order.

    Raises:
        ValueError: an entry has no numbers.
    """
    kernels = []
    for entry in re.split(r"(?=Compiling entry function)", report)[1:]:
        found = [pattern.search(entry) for pattern in (_ENTRY, _STACK, _REGISTERS)]
        if None in found:
            raise ValueError(f"ptxas' report is not understood: {entry.splitlines()[0]}")
        head, stack, registers = found
        shared = _SHARED.search(entry)
        kernels.append(
            Kernel(
                head["symbol"],
                head["architecture"],
                int(registers["registers"]),
                int(shared["shared"]) if shared else 0,
                int(stack["stack"]),
                int(stack["stores"]),
                int(stack["loads"]),
            )
        )
    return kernels


def readable(symbols: list[str]) -> list[str]:
    """Return names as in the source: kernel<types, flags>, without namespaces and parameters."""
    try:
        run = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return symbols
    return [_shorten(name) for name in run.stdout.splitlines()]


def _shorten(name: str) -> str:
    for index, float_type in enumerate(("f32", "bf16", "f16")):  # in the order of FloatType
        name = name.replace(f"(gkd::FloatType){index}", float_type)
    name = re.sub(r"\((?:\w+::)*(\w+)\)(-?\d+)", r"\1 \2", name)  # of another enumeration
    name = re.sub(r"\(anonymous namespace\)::|\bgkd::|\bcuda::|^void ", "", name)
    return name.split("(")[0].replace("> >", ">>")


def table(kernels: list[Kernel]) -> str:
    """Return one line for each kernel; the numbers of its architectures are separated by slashes where they differ."""
    by_symbol: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in sorted(kernels, key=lambda kernel: int(kernel.architecture.removeprefix("sm_"))):
        by_symbol[re.sub(r"_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}", "_GLOBAL__N_1", kernel.symbol)].append(kernel)
    names = readable([variants[0].symbol for variants in by_symbol.values()])
    rows = [("kernel", "architectures", "registers", "shared", "stack", "spills")]
    for name, variants in sorted(zip(names, by_symbol.values(), strict=True), key=lambda row: row[0]):
        rows.append(
            (
                name,
                _numbers([kernel.architecture.removeprefix("sm_") for kernel in variants]),
                _numbers([kernel.registers for kernel in variants]),
                _numbers([kernel.shared for kernel in variants]),
                _numbers([kernel.stack for kernel in variants]),
                _numbers([kernel.spill_stores + kernel.spill_loads for kernel in variants]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _numbers(values: list) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def main(reports: list[str]) -> int:
    kernels = [kernel for report in reports for kernel in parse(Path(report).read_text())]
    if not kernels:
        print("kernel_resources: the reports name no kernel", file=sys.stderr)
        return 1
    print(table(kernels))
    spilling = [kernel for kernel in kernels if not kernel.keeps_to_registers]
    print(f"{len(kernels)} kernels, {len(spilling)} with spills or a stack frame")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
