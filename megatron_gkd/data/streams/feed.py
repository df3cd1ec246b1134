"""Used rows of tokenized streams, one after the other, and where to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from megatron_gkd.data.report import DataReport
from megatron_gkd.data.streams.raw_order import Place
from megatron_gkd.data.streams.tokenized import StreamedRow, TokenizedChunk
from megatron_gkd.data.tokenizing import BLANK
from megatron_gkd.errors import UserError

FindProblem = Callable[[StreamedRow], str | None]
"""Returns why a run can't use a row; None where it can."""
OnFirstRows = Callable[[Sequence[StreamedRow], DataReport], None]


class NamedSource(Protocol):
    """What names the place of a row; `StreamSource` is one."""

    @property
    def name(self) -> str:
        """Name of the source in the recipe."""
        ...

    def locate(self, index: int) -> str:
        """Return the place of row `index`, from 0."""
        ...


@dataclass(frozen=True)
class StreamState:
    """Where a stream goes on.

    Attributes:
        places: of the sources, at the start of a chunk.
        used: rows of this chunk that were taken, without those that are dropped.
    """

    places: tuple[Place, ...]
    used: int = 0

    @classmethod
    def at_start(cls, sources: int) -> StreamState:
        """Return the state before the first row of any source."""
        return cls((Place(),) * sources)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> StreamState:
        """Return the state that `values` returned."""
        return cls(tuple(Place(**place) for place in values["places"]), values["used"])

    def values(self) -> dict[str, Any]:
        """Return plain values."""
        return {"places": [asdict(place) for place in self.places], "used": self.used}


@dataclass
class _Tally:
    """Counts the rows of one source; the attributes are those of `DataReport`."""

    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    shortened: int = 0
    truncated: int = 0
    images: int = 0
    pieces: int = 0
    conversations: int = 0
    special: int = 0
    first_bad: str | None = None
    first_special: str | None = None

    def add(self, row: StreamedRow, place: str) -> None:
        """Count a row that is used."""
        self.images += 0 if row.sample is None else len(row.sample.images)
        if row.is_piece:
            self.pieces += 1
            return
        self.used += 1
        self.forms[row.form] += 1
        self.shortened += row.shortened
        self.truncated += row.truncated
        self.conversations += row.conversation
        if row.special:
            self.special += 1
            self.first_special = self.first_special or f"{place}: {row.special}"

    def report(self) -> DataReport:
        """Return the counts."""
        return DataReport(
            self.used + self.dropped.total(),
            self.used,
            dict(sorted(self.dropped.items())),
            self.shortened,
            self.first_bad,
            self.images,
            pieces=self.pieces,
            forms=dict(self.forms),
            truncated=self.truncated,
            conversations=self.conversations,
            special=self.special,
            first_special=self.first_special,
        )


class RowFeed:
    """Take used rows from tokenized chunks, in order.

    Args:
        chunks: from the chunk on in which `state` is.
        state: where to go on.
        sources: what the rows' numbers of sources mean.
        is_skipping: whether bad rows are left out, in place of ending the run.
        find_problem: of rows that this run can't use.
        on_first: called with the rows that are taken first, and their counts.
    """

    def __init__(
        self,
        chunks: Iterator[TokenizedChunk],
        state: StreamState,
        sources: Sequence[NamedSource],
        *,
        is_skipping: bool = False,
        find_problem: FindProblem = lambda row: None,
        on_first: OnFirstRows = lambda rows, report: None,
    ) -> None:
        self.state, self._on_first = state, on_first
        self._chunks, self._sources = chunks, sources
        self._is_skipping, self._find_problem = is_skipping, find_problem
        self._rest: Iterator[StreamedRow] | None = None  # of the present chunk; None before the first
        self._skip = 0  # rows of the chunk that were taken before this run
        # The pass of each source's newest row that is used. Of a pass that has begun before this run, none is missed.
        self._newest_used = [place.epoch if place.taken else place.epoch - 1 for place in state.places]
        self._tallies = [_Tally() for _ in sources]
        self._has_taken = False

    def take(self, count: int) -> list[StreamedRow]:
        """Return the next `count` rows that are used.

        Raises:
            UserError: a row is bad and may not be skipped, this run can't use it, or a whole pass over a source has no
                row that is used.
        """
        rows: list[StreamedRow] = []
        while len(rows) < count:
            row = None if self._rest is None else next(self._rest, None)
            if row is None:
                self._begin(next(self._chunks))
            elif row.dropped:
                self._drop(row)
            else:
                self.state = replace(self.state, used=self.state.used + 1)
                if self.state.used > self._skip:
                    rows.append(self._use(row))
        if not self._has_taken:
            self._has_taken = True
            self._on_first(rows, self.report())
        return rows

    def close(self) -> None:
        """End the processes that tokenize."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def report(self) -> DataReport:
        """Count the rows that this process has read."""
        return DataReport.of_sources(
            [source.name for source in self._sources], [tally.report() for tally in self._tallies]
        )

    def _begin(self, chunk: TokenizedChunk) -> None:
        self._skip = self.state.used if self._rest is None else 0
        self.state, self._rest = StreamState(chunk.start), iter(chunk.rows)

    def _use(self, row: StreamedRow) -> StreamedRow:
        problem = self._find_problem(row)
        if problem is not None:
            raise UserError(f"{self.locate(row)}: {problem}")
        self._newest_used[row.source] = row.epoch
        self._tallies[row.source].add(row, self.locate(row) if row.special else "")
        return row

    def _drop(self, row: StreamedRow) -> None:
        if row.error:
            error = f"{self.locate(row)}: {row.error}"
            if not self._is_skipping:
                raise UserError(f"{error} (data_errors: skip drops such rows)")
            self._tallies[row.source].first_bad = self._tallies[row.source].first_bad or error
        if row.epoch > self._newest_used[row.source] + 1:
            raise UserError(
                f"{self._sources[row.source].name}: yields nothing to train on: none of its rows is used; "
                f"of all that were read: {self.report().summary()}"
            )
        if row.dropped != BLANK:
            self._tallies[row.source].dropped[row.dropped] += 1

    def locate(self, row: StreamedRow) -> str:
        """Return the place of a row for messages."""
        return self._sources[row.source].locate(row.index)
