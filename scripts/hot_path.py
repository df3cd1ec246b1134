"""The hot path of a kernel's loop: the way that a thread takes through it for nearly all packs of a row."""

from __future__ import annotations

from dataclasses import dataclass

from sass import GLOBAL_ACCESSES, Instruction, Loop


@dataclass(frozen=True)
class _State:
    """What matters of a path up to the end of a block.

    Attributes:
        wide_bytes: of the accesses to global memory of 16 bytes or more on it.
        narrow: the number of the other accesses to global memory.
        used: registers of wide loads, each as (address of the load, register), that it has read; the address is -1 for
            those of the iteration before.
        pending: the same of those that it has not read, but may.
    """

    wide_bytes: int
    narrow: int
    used: frozenset[tuple[int, int]]
    pending: frozenset[tuple[int, int]]


def hot_path(loop: Loop) -> list[Instruction]:
    """Return the instructions of the hot path through one iteration, in order.

    It is, of all paths from the loop's header back to it that pass through no inner loop twice, one on which

    1. the most bytes are moved by accesses to global memory of 16 bytes or more (so not one that leaves out a guarded
       pack),
    2. then, there are the fewest other accesses to it (so not one that takes elements one by one, as rows that are not
       aligned need it),
    3. then, the most registers that wide loads have written are read before they are written again, by anything but a
       maximum or minimum (so not one that leaves out the work on a pack that it has loaded),
    4. then, the fewest instructions are issued (so not one that repeats a pack whose sums became NaN, moves a
       reference, or enters another rarely needed branch).

    An instruction whose predicate is false is issued as well, and counts.
    """
    order = list(loop.blocks)  # reverse postorder: an edge backwards is one of an inner loop
    place = {start: index for index, start in enumerate(order)}
    loaded = {
        register
        for block in loop.blocks.values()
        for instruction in block.instructions
        if instruction.is_wide_load
        for register in instruction.writes
    }
    by_previous = frozenset((-1, register) for register in loaded & _read_first(loop))
    states: dict[int, dict[_State, list[int]]] = {start: {} for start in order}
    states[loop.header] = {_State(0, 0, frozenset(), by_previous): []}
    best: tuple[tuple[int, ...], list[int]] | None = None
    for start in order:
        for state, path in states[start].items():
            left, walked = _through(state, loop.blocks[start].instructions), [*path, start]
            length = sum(len(loop.blocks[block].instructions) for block in walked)
            for successor in loop.blocks[start].successors:
                if successor == loop.header:
                    score = (left.wide_bytes, -left.narrow, len(left.used), -length)
                    if best is None or score > best[0]:
                        best = score, walked
                elif successor in place and place[successor] > place[start]:
                    known = states[successor].get(left)
                    if known is None or length < sum(len(loop.blocks[block].instructions) for block in known):
                        states[successor][left] = walked
    if best is None:
        return []
    return [instruction for block in best[1] for instruction in loop.blocks[block].instructions]


def _through(state: _State, instructions: list[Instruction]) -> _State:
    wide_bytes, narrow, used, pending = state.wide_bytes, state.narrow, set(state.used), set(state.pending)
    for instruction in instructions:
        if "MNMX" not in instruction.opcode:
            read = {entry for entry in pending if entry[1] in instruction.reads}
            used |= read
            pending -= read
        # Even if it is predicated: as a rule, what reads the result has the same predicate.
        pending -= {entry for entry in pending if entry[1] in instruction.writes}
        wide_bytes += instruction.wide_bytes
        narrow += instruction.name in GLOBAL_ACCESSES and not instruction.wide_bytes
        if instruction.is_wide_load:
            pending |= {(instruction.address, register) for register in instruction.writes}
    return _State(wide_bytes, narrow, frozenset(used), frozenset(pending))


def _read_first(loop: Loop) -> set[int]:
    """Return the registers that an iteration may read before it writes them."""
    live: dict[int, set[int]] = {start: set() for start in loop.blocks}
    changed = True
    while changed:
        changed = False
        for start, block in reversed(loop.blocks.items()):
            needed = set().union(*(live[successor] for successor in block.successors if successor in live))
            for instruction in reversed(block.instructions):
                needed -= instruction.writes
                needed |= instruction.reads
            changed |= needed != live[start]
            live[start] = needed
    return live[loop.header]
