"""Count a GPU kernel's instructions per pair of logits: python scripts/kernel_instructions.py OBJECT... [--update].

A pair is one logit of the student and one of the teacher; in a kernel that reads one model only, one logit. What is
counted is the hot path of the loop over a row's columns (see hot_path.py), divided by the pairs that it loads. Where
several loops of a kernel load equally much, as with and without the cross-entropy, the longest counts. A kernel without
loads of 16 bytes from global memory in a loop has no count; loops over shared memory are not counted.

The counts are compared with those in scripts/benchmarks/results/kernel_instructions.json. The exit status is 1 where
one has grown by more than 5 %, and where a kernel is missing on either side. --update writes that file, and beside it
the table of docs/performance.md. --show NAME prints the hot paths of the kernels whose names contain it. With another
release of nvcc than the file's, counts are printed and not compared.

OBJECT is an object file or cubin from nvcc. Needs cuobjdump (on PATH, or in the package triton) and c++filt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hot_path import hot_path
from kernel_resources import readable
from sass import Function, Instruction, read

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results" / "kernel_instructions.json"
ALLOWED_GROWTH = 1.05
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# Kernels that read two models, unless the second expression finds that they read one.
_TWO_MODELS = re.compile(r"^(statistics|sums|gradient|cluster_loss)_kernel")
_ONE_MODEL = re.compile(r"Columns<\w+, \w+, false")

# The rows of the table: what it is, the kernel, bytes that a pair moves, targets for sm_90 and sm_100.
ROWS = (
    ("sums of a row, first pass", "statistics_kernel<bf16, Columns<false, false, true>>", 4, None),
    ("the same with moments", "statistics_kernel<bf16, Columns<true, false, true>>", 4, None),
    ("the same, at another temperature than 1", "statistics_kernel<bf16, Columns<true, true, true>>", 4, (23, 22.5)),
    ("second pass, β = ½", "sums_kernel<bf16, fast::EvenJsd>", 4, (24, 21)),
    ("second pass, other β between 0 and 1", "sums_kernel<bf16, fast::GeneralizedJsd>", 4, (24, 21)),
    ("second pass, α", "sums_kernel<bf16, fast::Alpha>", 4, None),
    ("second pass, skewed forward KL", "sums_kernel<bf16, fast::SkewedForwardKl>", 4, None),
    ("second pass, skewed reverse KL", "sums_kernel<bf16, fast::SkewedReverseKl>", 4, None),
    ("second pass, total variation", "sums_kernel<bf16, fast::TotalVariation>", 4, None),
    ("gradient, β = ½", "gradient_kernel<bf16, fast::EvenJsd, false, false>", 6, (21, 21)),
    ("gradient, other β between 0 and 1", "gradient_kernel<bf16, fast::GeneralizedJsd, false, false>", 6, (21, 21)),
    ("the same with the cross-entropy", "gradient_kernel<bf16, fast::GeneralizedJsd, false, true>", 6, None),
    ("gradient, β = 0", "gradient_kernel<bf16, fast::ForwardKl, false, false>", 6, None),
    ("gradient, β = 1", "gradient_kernel<bf16, fast::ReverseKl, false, false>", 6, None),
    ("gradient, α", "gradient_kernel<bf16, fast::Alpha, false, false>", 6, None),
    ("gradient, skewed forward KL", "gradient_kernel<bf16, fast::SkewedForwardKl, false, false>", 6, None),
    ("gradient, skewed reverse KL", "gradient_kernel<bf16, fast::SkewedReverseKl, false, false>", 6, None),
    ("gradient, total variation", "gradient_kernel<bf16, fast::TotalVariation, false, false>", 6, None),
)

Counts = dict[str, dict[str, float]]  # by kernel, then architecture


def models_read(name: str) -> int:
    return 2 if _TWO_MODELS.match(name) and not _ONE_MODEL.search(name) else 1


def element_bytes(name: str) -> int:
    return 2 if re.search(r"\bb?f16\b", name) else 4


def counted_loop(function: Function) -> list[Instruction]:
    """Return the hot path of the loop that counts; nothing for a kernel without loads of 16 bytes in a loop."""
    paths = [hot_path(loop) for loop in function.loops_with_wide_loads()]
    return max(paths, key=lambda path: (_loaded(path), len(path)), default=[])


def _loaded(path: list[Instruction]) -> int:
    return sum(instruction.wide_bytes for instruction in path if instruction.is_wide_load)


def pairs(name: str, path: list[Instruction]) -> int:
    return _loaded(path) // (models_read(name) * element_bytes(name))


def listing(path: str) -> str:
    """Return the machine code of an object file, as cuobjdump prints it."""
    return subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout


def cuobjdump() -> str:
    """Return the path of cuobjdump.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    if found is None:
        raise FileNotFoundError("cuobjdump = not found: neither on PATH nor in the package triton; install triton")
    return found


def hot_paths(path: str) -> list[tuple[str, str, list[Instruction]]]:
    """Return (name, architecture, hot path) of the kernels of an object file that have one."""
    functions = list(read(listing(path)))
    found = [(function.symbol, function.architecture, counted_loop(function)) for function in functions]
    names = readable([symbol for symbol, _, _ in found])
    return [(name, architecture, loop) for name, (_, architecture, loop) in zip(names, found, strict=True) if loop]


def count(paths: list[tuple[str, str, list[Instruction]]]) -> Counts:
    """Return instructions per pair.

    Raises:
        ValueError: two kernels have the same name, so that one would hide the other.
    """
    counts: Counts = defaultdict(dict)
    for name, architecture, path in sorted(paths, key=lambda entry: (entry[0], int(entry[1].removeprefix("sm_")))):
        if architecture in counts[name]:
            raise ValueError(f"{name} on {architecture}: two kernels have this name; give one another")
        counts[name][architecture] = round(len(path) / pairs(name, path), 1)
    return dict(counts)


def complaints(counts: Counts, known: Counts) -> list[str]:
    """Return one line for each kernel that has grown, or is missing on either side."""
    found = []
    accept = "accept it with: bash scripts/compile_kernels.sh --update"
    for name in sorted(counts.keys() | known.keys()):
        for architecture in ARCHITECTURES:
            now = counts.get(name, {}).get(architecture)
            before = known.get(name, {}).get(architecture)
            key = f"{name} on {architecture}"
            if now is None and before is not None:
                found.append(f"{key} = no count: {RESULTS.name} has {before}; the kernel or its loop is gone; {accept}")
            elif now is not None and before is None:
                found.append(f"{key} = {now} instructions per pair: {RESULTS.name} does not have it; {accept}")
            elif now is not None and before is not None and now > ALLOWED_GROWTH * before:
                grown = f"{100 * (now / before - 1):.0f} % more than the {before} of {RESULTS.name}"
                found.append(f"{key} = {now} instructions per pair: {grown}; make it shorter, or {accept}")
    return found


def table(counts: Counts) -> str:
    """Return the table of docs/performance.md.

    Raises:
        KeyError: a row's kernel has no count.
    """
    lines = [
        "| pass, bf16 | bytes per pair | sm_80 | sm_90 | sm_100 | target sm_90 / sm_100 |",
        "| --- |" + " ---: |" * 5,
    ]
    for what, name, size, target in ROWS:
        if name not in counts:
            raise KeyError(f"ROWS of {Path(__file__).name}: no kernel {name}; name one of those in {RESULTS.name}")
        cells = [str(counts[name].get(architecture, "")) for architecture in ARCHITECTURES]
        lines.append(f"| {what} | {size} | {' | '.join(cells)} | {' / '.join(map(str, target)) if target else ''} |")
    return "\n".join(lines) + "\n"


def write(counts: Counts, compiler: str) -> None:
    """Write the counts, one line for each kernel, and the table."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts))
    header = f'  "compiler": {json.dumps(compiler)},\n  "instructions per pair": '
    RESULTS.write_text(f"{{\n{header}{{\n{lines}\n  }}\n}}\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(
        f"# Instructions per pair of logits\n\nFrom the machine code of nvcc {compiler}; see `kernel_instructions.py`."
        f"\n\n{table(counts)}",
        encoding="utf-8",
    )


def nvcc_release() -> str:
    found = re.search(
        r"release (\d+\.\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )
    return found[1] if found else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Count, then compare, write or show; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="+")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--show", metavar="NAME")
    options = parser.parse_args(arguments)
    with ProcessPoolExecutor() as pool:
        paths = [entry for of_object in pool.map(hot_paths, options.objects) for entry in of_object]
    if options.show is not None:
        for name, architecture, path in paths:
            if options.show in name:
                print(f"{name} on {architecture}: {len(path)} instructions, {pairs(name, path)} pairs", *path, sep="\n")
        return 0
    counts = count(paths)
    for name, of_architecture in counts.items():
        print(f"{name}: {'/'.join(map(str, of_architecture.values()))} instructions per pair")
    return _write_or_compare(counts, options.update)


def _write_or_compare(counts: Counts, is_update: bool) -> int:
    compiler = nvcc_release()
    if is_update:
        write(counts, compiler)
        return 0
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    if known["compiler"] != compiler:
        print(f"nvcc = {compiler}: {RESULTS.name} is from {known['compiler']}; counts are not compared")
        return 0
    found = complaints(counts, known["instructions per pair"])
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
