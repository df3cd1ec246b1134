"""Tokenization of a source in shards by several processes; finished shards remain if the build is killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter

from megatron_gkd.data.columns import IMAGES, SOURCE_ROW, STATUS
from megatron_gkd.data.sources import Source
from megatron_gkd.data.tokenizing import BLANK, RowTokenizer
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.current_phase import note_progress
from megatron_gkd.runtime.disk import publish

SHARD_ROWS = 2048  # of a shard; more where the source would have more than MAX_SHARDS shards
MAX_SHARDS = 256  # all of them are open together at the end of a build
MAX_WORKERS = 16  # where the recipe does not set their number
_BATCH_ROWS = 256


@dataclass(frozen=True)
class ShardSummary:
    """Counts of the rows of one shard.

    Attributes:
        used: samples that are in the shard's file.
        dropped: the other rows by reason, without blank lines.
        shortened: used rows whose prompt was shortened.
        bad: rows that are wrong in themselves.
        first_bad: number in the source and error of the first of these.
        digest: hash of the used rows.
        images: number of images in the used rows.
        pieces: number of samples beyond the first of each row.
        conversations: used rows that are turns of a chat template.
        forms: number of used rows by their form.
        truncated: used rows that have lost tokens.
        special: used rows with a special token in a message.
        first_special: number in the source of the first of these, and what it has.
    """

    used: int
    dropped: dict[str, int]
    shortened: int
    bad: int
    first_bad: tuple[int, str] | None
    digest: str
    images: int = 0
    pieces: int = 0
    conversations: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    special: int = 0
    first_special: tuple[int, str] | None = None


@dataclass(frozen=True)
class ShardWriter:
    """Tokenize shards of a source into files in `folder`."""

    source: Source
    tokenize: RowTokenizer
    folder: Path

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-len(self.source) // self._rows)

    @property
    def _rows(self) -> int:
        return max(SHARD_ROWS, -(-len(self.source) // MAX_SHARDS))

    def rows_of(self, shard: int) -> range:
        """Return the indices of the shard's rows in the source."""
        return range(shard * self._rows, min((shard + 1) * self._rows, len(self.source)))

    def path(self, shard: int) -> Path:
        """Return the Arrow file of the shard's used rows."""
        return self.folder / f"{shard:05}.arrow"

    def read(self, shard: int) -> ShardSummary | None:
        """Return the summary of a shard; None if it is not finished."""
        try:
            return ShardSummary(**json.loads(self._summary_path(shard).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def write(self, shard: int) -> int:
        """Tokenize one shard and return `shard`. Its summary is written last, and marks it as finished."""
        rows = self.rows_of(shard)
        unfinished = self.path(shard).with_suffix(f".{os.getpid()}")
        tally = _Tally()
        features = {name: value for name, value in self.tokenize.features.items() if name not in STATUS}
        with ArrowWriter(features=datasets.Features(features | SOURCE_ROW), path=str(unfinished)) as file:
            for first in range(rows.start, rows.stop, _BATCH_ROWS):
                columns = self.tokenize(self.source.table[first : min(first + _BATCH_ROWS, rows.stop)])
                used = tally.add(first, columns)
                if used:
                    rows_of_used = [first + columns["batch_row"][row] for row in used]
                    numbers = {name: [self.source.number(row) for row in rows_of_used] for name in SOURCE_ROW}
                    file.write_batch({name: [columns[name][row] for row in used] for name in features} | numbers)
            file.finalize()
        publish(unfinished, self.path(shard))
        unfinished.write_text(json.dumps(asdict(tally.summary())), encoding="utf-8")
        publish(unfinished, self._summary_path(shard))
        return shard

    def _summary_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.json"


def tokenize_shards(
    writer: ShardWriter, workers: int | None, report: Callable[[int, int], None] = lambda done, total: None
) -> list[ShardSummary]:
    """Write the shards that are not finished yet, and return the summaries of all.

    Args:
        writer: writer of the source's shards.
        workers: most processes; None: as many as the cores that this process may use, up to `MAX_WORKERS`.
        report: called at the start and after each shard, with the numbers of finished rows and of all rows.

    Raises:
        UserError: a process was killed, or a finished shard is gone.
    """
    missing = [shard for shard in range(writer.count) if writer.read(shard) is None]
    workers = min(workers or default_workers(), len(missing))
    total = len(writer.source)
    done = total - sum(len(writer.rows_of(shard)) for shard in missing)
    report(done, total)
    for shard in map(writer.write, missing) if workers <= 1 else _in_processes(writer, missing, workers):
        done += len(writer.rows_of(shard))
        note_progress()
        report(done, total)
    summaries = [summary for summary in map(writer.read, range(writer.count)) if summary is not None]
    if len(summaries) < writer.count:
        raise UserError(f"{writer.folder}: a finished shard was removed while others were written; start again")
    return summaries


def default_workers() -> int:
    """Return the number of processes where the recipe does not set it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def _in_processes(writer: ShardWriter, shards: Sequence[int], workers: int) -> Iterator[int]:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, _start_worker, (writer, os.getpid())) as pool:
        try:
            for finished in as_completed([pool.submit(_write, shard) for shard in shards]):
                yield finished.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"data.preprocessing_num_workers = {workers}: a process that tokenizes was killed, probably for lack "
                "of memory; start again with fewer processes: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_writer: ShardWriter  # of a worker process


def _start_worker(writer: ShardWriter, parent: int) -> None:
    global _writer
    _writer = writer
    start_worker_process(parent)


def start_worker_process(parent: int) -> None:
    """Prepare a process that tokenizes. It ends with the process `parent`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, which may be killed without closing anything."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _write(shard: int) -> int:
    return _writer.write(shard)


class _Tally:
    """Counts the rows of a shard, batch after batch."""

    def __init__(self) -> None:
        self._used, self._shortened, self._images, self._pieces, self._conversations = 0, 0, 0, 0, 0
        self._dropped: Counter[str] = Counter()
        self._truncated = 0
        self._forms: Counter[str] = Counter()
        self._bad = 0
        self._first_bad: tuple[int, str] | None = None
        self._special = 0
        self._first_special: tuple[int, str] | None = None
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, first: int, columns: dict[str, list[Any]]) -> list[int]:
        """Count a batch whose first row has the index `first`, and return which of its samples are used."""
        used = [row for row, reason in enumerate(columns["dropped"]) if not reason]
        self._used += len(used)
        self._pieces += len(used) - len({columns["batch_row"][row] for row in used})
        self._shortened += sum(columns["shortened"][row] for row in used)
        self._conversations += sum(columns["conversation"][row] for row in used)
        self._truncated += sum(columns["truncated"][row] for row in used)
        self._forms.update({columns["batch_row"][row]: columns["form"][row] for row in used}.values())
        self._dropped.update(reason for reason in columns["dropped"] if reason and reason != BLANK)
        for row, error in enumerate(columns["error"]):
            if error:
                self._bad += 1
                self._first_bad = self._first_bad or (first + columns["batch_row"][row], error)
        for row in used:
            self._note_special(first + columns["batch_row"][row], columns["special"][row])
            for name in ("input_ids", "labels", "teacher_prompt"):
                self._add_to_digest(np.asarray(columns[name][row], dtype="<i4").tobytes())
            self._add_to_digest(columns["tag"][row].encode())
            if len(columns["label_weights"][row]) or columns["response_start"][row] >= 0:
                weights = np.asarray(columns["label_weights"][row], dtype="<f4")
                self._add_to_digest(b"weights %d " % columns["response_start"][row] + weights.tobytes())
            for name in IMAGES:
                for image in columns[name][row] if name in columns else ():  # absent where the student reads text alone
                    self._add_to_digest(f"{name} {image['digest']}".encode())
        self._images += sum(len(columns["images"][row]) for row in used) if "images" in columns else 0
        return used

    def _note_special(self, index: int, special: str) -> None:
        if special:
            self._special += 1
            self._first_special = self._first_special or (index, special)

    def _add_to_digest(self, content: bytes) -> None:
        self._digest.update(len(content).to_bytes(8, "little") + content)

    def summary(self) -> ShardSummary:
        return ShardSummary(
            self._used,
            dict(self._dropped),
            self._shortened,
            self._bad,
            self._first_bad,
            self._digest.hexdigest(),
            self._images,
            self._pieces,
            self._conversations,
            dict(self._forms),
            self._truncated,
            self._special,
            self._first_special,
        )
