"""Control flow of GPU kernels in machine code (SASS), and the hot path of their loops.

Read what `cuobjdump -sass` prints of an object file or a cubin. Nothing here depends on this project.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_FUNCTION = re.compile(r"^\s*Function : (?P<symbol>\S+)", re.MULTILINE)
_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z]\S*)(?P<rest>.*?)\s*;",
    re.MULTILINE,
)
_ARCHITECTURE = re.compile(r"^\s*code for (?P<architecture>sm_\w+)", re.MULTILINE)
_REGISTER = re.compile(r"(?<![UA-Z0-9])R(?P<number>\d+)(?P<wide>\.64|\.F32x2)?")
_TARGET = re.compile(r"(?P<target>0x[0-9a-f]+)\s*$")
_WIDE = re.compile(r"\.(?P<bits>128|256)(?=\.|$)")
GLOBAL_ACCESSES = ("LDG", "STG", "LD", "ST")
_ENDING = ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    is_predicated: bool

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def target(self) -> int | None:
        """Return the address at the end of a branch's operands."""
        found = _TARGET.search(self.operands)
        return int(found["target"], 16) if found and self.name in ("BRA", "BSSY", "JMP") else None

    @cached_property
    def wide_bytes(self) -> int:
        """Return the bytes of an access to global memory of 16 bytes or more; 0 for any other instruction."""
        found = _WIDE.search(self.opcode)
        return int(found["bits"]) // 8 if found and self.name in GLOBAL_ACCESSES else 0

    @property
    def is_wide_load(self) -> bool:
        return self.wide_bytes > 0 and self.name in ("LDG", "LD")

    @cached_property
    def writes(self) -> frozenset[int]:
        destinations = [operand.strip() for operand in self.operands.split(",")]
        count = 2 if self.wide_bytes == 32 else 1
        numbers: set[int] = set()
        for operand in destinations[:count]:
            found = _REGISTER.match(operand)
            if found and not self.name.startswith("ST"):
                numbers |= set(range(int(found["number"]), int(found["number"]) + self._written_registers()))
        return frozenset(numbers)

    @cached_property
    def reads(self) -> frozenset[int]:
        skipped = 0 if not self.writes else 2 if self.wide_bytes == 32 else 1
        sources = ",".join(self.operands.split(",")[skipped:])
        numbers: set[int] = set()
        for found in _REGISTER.finditer(sources):
            size = 2 if found["wide"] else self.wide_bytes // 4 if self.name in ("STG", "ST") else 1
            numbers |= set(range(int(found["number"]), int(found["number"]) + size))
        return frozenset(numbers)

    def _written_registers(self) -> int:
        if self.wide_bytes:
            return 4
        is_pair = ".64" in self.opcode or ".WIDE" in self.opcode or self.name in ("FADD2", "FMUL2", "FFMA2")
        return 4 if ".128" in self.opcode else 2 if is_pair else 1

    def __str__(self) -> str:
        return f"{self.address:05x} {'@ ' if self.is_predicated else '  '}{self.opcode} {self.operands.strip()}"


@dataclass
class Function:
    """Represent one kernel.

    Attributes:
        symbol: its mangled name.
        architecture: such as sm_90.
        instructions: in the order of their addresses, without the NOPs that fill it up.
    """

    symbol: str
    architecture: str
    instructions: list[Instruction]
    _blocks: dict[int, Block] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[int, Block]:
        """Return the basic blocks by their first address."""
        if not self._blocks:
            self._blocks = _split(self.instructions)
        return self._blocks

    def loops_with_wide_loads(self) -> list[Loop]:
        """Return the innermost loops with wide loads, in the order of addresses.

        A loop around another one with wide loads is left out: what it adds is done once or twice a row.
        """
        loops = _natural_loops(self.blocks)
        chosen = {}
        for start, block in self.blocks.items():
            if any(instruction.is_wide_load for instruction in block.instructions):
                around = [loop for loop in loops if start in loop.blocks]
                if around:
                    innermost = min(around, key=lambda loop: len(loop.blocks))
                    chosen[innermost.header] = innermost
        return [loop for header, loop in sorted(chosen.items()) if not (chosen.keys() - {header}) & loop.blocks.keys()]


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int]


@dataclass
class Loop:
    """Represent a natural loop.

    Attributes:
        header: the address of the block through which the loop is entered.
        blocks: all blocks of it by their first address.
    """

    header: int
    blocks: dict[int, Block]


def read(listing: str) -> Iterator[Function]:
    """Yield the functions of one or several listings of `cuobjdump -sass`."""
    architecture = ""
    position = 0
    functions = list(_FUNCTION.finditer(listing))
    for index, found in enumerate(functions):
        for header in _ARCHITECTURE.finditer(listing, position, found.start()):
            architecture = header["architecture"]
        position = found.end()
        end = functions[index + 1].start() if index + 1 < len(functions) else len(listing)
        lines = [
            Instruction(int(line["address"], 16), line["opcode"], line["rest"], line["predicate"] is not None)
            for line in _LINE.finditer(listing, position, end)
        ]
        yield Function(found["symbol"], architecture, [line for line in lines if line.name != "NOP"])


def _split(instructions: list[Instruction]) -> dict[int, Block]:
    after = {one.address: following for one, following in itertools.pairwise(instructions)}
    joins: dict[str, int] = {}  # by barrier register: where its latest BSSY says that threads go on together
    jumps: dict[int, int] = {}
    starts = {instructions[0].address}
    addresses = [one.address for one in instructions]
    for instruction in instructions:
        # A target may be one of the NOPs, which are not here: what follows them is meant.
        target = instruction.target and next((one for one in addresses if one >= instruction.target), None)
        if target is not None and instruction.name == "BSSY":
            joins[instruction.operands.split(",")[0].strip()] = target
        elif target is not None:
            jumps[instruction.address] = target
        elif instruction.name == "BSYNC" and instruction.operands.strip() in joins:
            jumps[instruction.address] = joins[instruction.operands.strip()]
        if instruction.address in jumps or instruction.name in _ENDING:
            starts |= {jumps.get(instruction.address, instruction.address)}
            if instruction.address in after:
                starts.add(after[instruction.address].address)
    blocks: dict[int, Block] = {}
    for instruction in instructions:
        if instruction.address in starts:
            current = blocks[instruction.address] = Block([], [])
        current.instructions.append(instruction)
        following = after.get(instruction.address)
        if following is None or following.address in starts:
            current.successors = _successors(instruction, following, jumps, blocks_at=starts)
    return blocks


def _successors(
    last: Instruction, following: Instruction | None, jumps: dict[int, int], blocks_at: set[int]
) -> list[int]:
    is_conditional = last.is_predicated or (last.name == "BRA" and "," in last.operands)
    addresses = [jumps[last.address]] if last.address in jumps else []
    goes_on = is_conditional if last.name in _ENDING else last.address not in jumps
    goes_on |= is_conditional and last.name != "BSYNC"
    if following is not None and goes_on:
        addresses.append(following.address)
    return [address for address in dict.fromkeys(addresses) if address in blocks_at]


def _natural_loops(blocks: dict[int, Block]) -> list[Loop]:
    entry = next(iter(blocks))
    order = _reverse_postorder(blocks, entry)
    before: dict[int, list[int]] = {start: [] for start in order}
    for start in order:
        for successor in blocks[start].successors:
            before[successor].append(start)
    dominators = {start: set(order) for start in order}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            found = set.intersection(*(dominators[block] for block in before[start])) | {start}
            changed |= found != dominators[start]
            dominators[start] = found
    members: dict[int, set[int]] = {}
    for start in order:
        for header in set(blocks[start].successors) & dominators[start]:
            inside = members.setdefault(header, {header})
            waiting = [start]
            while waiting:
                block = waiting.pop()
                if block not in inside:
                    inside.add(block)
                    waiting += before[block]
    return [
        Loop(header, {start: blocks[start] for start in order if start in inside}) for header, inside in members.items()
    ]


def _reverse_postorder(blocks: dict[int, Block], entry: int) -> list[int]:
    seen = {entry}
    postorder = []
    stack = [(entry, iter(blocks[entry].successors))]
    while stack:
        start, successors = stack[-1]
        following = next((block for block in successors if block not in seen), None)
        if following is None:
            postorder.append(start)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return postorder[::-1]
