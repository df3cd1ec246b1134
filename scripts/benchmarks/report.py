"""The tables of a run of ``loss.py``, made from the JSON that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from benchmarks.head import PRODUCTS
from benchmarks.measure import OURS

DIVERGENCE_COLUMNS = (
    "divergence",
    "× ours",
    "forward × ours",
    "ms",
    "forward ms",
    "of copy",
    "extra memory",
    "gradient error",
)
KERNEL_COLUMNS = ("kernel", "of copy", "of read", "ms", "GB/s")
HEAD_COLUMNS = (
    "head and loss",
    "× products",
    "× ours",
    "ms",
    "TFLOP/s",
    "extra memory",
    "gradient error",
    "of the head",
)
NOTES = """\
Times are medians of forward and backward; × is another's time over ours. "of copy": the bytes that streaming passes
have to move (7 reads or writes of one model's logits for 0 < β < 1, 5 at the ends), over the time, over the rate of a
large copy in the same run. "of read": the same beside a large read, for passes that only read. Extra memory: peak
growth less the gradient. Errors of gradients: relative, of some rows against fp64. TP: the columns of one shard on one
process, without collectives; contestants that are not vocabulary-parallel take them for a whole vocabulary."""


@dataclass(frozen=True)
class Section:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        alignment = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, alignment, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, ""])


def sections(run: dict) -> Iterator[Section]:
    for case in run["divergence"]:
        yield Section(case["case"], DIVERGENCE_COLUMNS, [_divergence_row(case, name) for name in case["contestants"]])
    yield from map(kernel_section, run.get("kernels", []))
    for case in run.get("head", []):
        yield Section(case["case"], HEAD_COLUMNS, [_head_row(case, name) for name in case["contestants"]])


def kernel_section(case: dict) -> Section:
    return Section(case["case"], KERNEL_COLUMNS, [_kernel_row(case, name) for name in case["contestants"]])


def headline(run: dict) -> str:
    found = run["environment"]
    where = f"{found['device']}, {found['date']}"
    threads = f", {found['threads']} thread(s)" if found["device_type"] == "cpu" else ""
    return f"{where}: torch {found['torch']}, {found['implementation']} implementation{threads}"


def markdown(run: dict) -> str:
    return "\n".join([f"## {headline(run)}", "", NOTES, "", *(section.markdown() for section in sections(run))])


# ---- figures


def seconds(case: dict, name: str, key: str = "total_s") -> float | None:
    """Return the median seconds of a contestant; None where it didn't run."""
    samples = case["contestants"][name][key]
    return median(samples) if samples else None


def ratio(case: dict, name: str, base: str, key: str = "total_s") -> float | None:
    """Return how many times as long as `base` the contestant takes; None where either didn't run."""
    mine, theirs = seconds(case, name, key), seconds(case, base, key)
    return None if mine is None or theirs is None else mine / theirs


def copy_rate(case: dict) -> float:
    """Return the bytes that a copy reads and writes per second."""
    return _rate(case["copy"])


def read_rate(case: dict) -> float | None:
    """Return the bytes that a large read reads per second; None for a run of a time when it was not measured."""
    return _rate(case["read"]) if "read" in case else None


def _rate(yardstick: dict) -> float:
    return yardstick["moved_bytes"] / median(yardstick["seconds"])


def share_of_copy(case: dict, name: str) -> float | None:
    """Return the rate at which the contestant moves the bytes that must move, over the rate of a copy."""
    mine = seconds(case, name)
    return None if mine is None else case["total_bytes"] / mine / copy_rate(case)


def kernel_rate(case: dict, kernel: str) -> float | None:
    """Return the bytes read and written per second."""
    taken = seconds(case, kernel)
    return None if taken is None else case["moved_bytes"][kernel] / taken


def extra_bytes(case: dict, name: str) -> float | None:
    """Return the peak growth of memory beyond the results; None where that was not measured."""
    peaks = [peak for peak in case["contestants"][name]["peak_bytes"] if peak is not None]
    return max(0, median(peaks) - case["result_bytes"]) if peaks else None


def milliseconds(value: float) -> str:
    """Return seconds as milliseconds, in three digits or more."""
    return f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"


# ---- rows


def _divergence_row(case: dict, name: str) -> list[str]:
    found = case["contestants"][name]
    if found["status"] != "ok":
        return _absent(name, found, len(DIVERGENCE_COLUMNS))
    share = share_of_copy(case, name)
    return [
        name,
        _times(ratio(case, name, OURS)),
        _times(ratio(case, name, OURS, "first_s")),
        milliseconds(seconds(case, name)),
        milliseconds(seconds(case, name, "first_s")),
        f"{share:.1%}",
        _size(extra_bytes(case, name)),
        _error(found["error"]),
    ]


def _kernel_row(case: dict, kernel: str) -> list[str]:
    rate = kernel_rate(case, kernel)
    of_read = read_rate(case)
    only_reads = case.get("read_bytes", {}).get(kernel) == case["moved_bytes"][kernel]
    share = f"{rate / of_read:.1%}" if of_read and only_reads else ""
    return [kernel, f"{rate / copy_rate(case):.1%}", share, milliseconds(seconds(case, kernel)), f"{rate / 1e9:.4g}"]


def _head_row(case: dict, name: str) -> list[str]:
    found = case["contestants"][name]
    if found["status"] != "ok":
        return _absent(name, found, len(HEAD_COLUMNS))
    taken = seconds(case, name)
    return [
        name,
        _times(ratio(case, name, PRODUCTS)),
        _times(ratio(case, name, OURS)),
        milliseconds(taken),
        f"{case['operations'] / taken / 1e12:.3g}",
        "" if name == PRODUCTS else _size(extra_bytes(case, name)),
        _error(found["error"]),
        _error(case.get("weight_errors", {}).get(name)),
    ]


def _absent(name: str, found: dict, columns: int) -> list[str]:
    why = f"{found['status']}: {found['install']}" if found["install"] else found["status"]
    return [f"{name} ({why})", *[""] * (columns - 1)]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _size(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
