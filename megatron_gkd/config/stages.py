"""The decoder layers of each pipeline stage, from the recipe's keys.

The notation of a layout, and what Megatron-Core does with it, are those of Megatron-Core 0.16.1
(`transformer/pipeline_parallel_layer_layout.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_gkd.config.schema import OneTeacher, ParallelSection

FIRST = "decoder_first_pipeline_num_layers"
LAST = "decoder_last_pipeline_num_layers"
LAYOUT = "pipeline_model_parallel_layout"
STAGE_KEYS = (FIRST, LAST, LAYOUT)
_MOST_COPIES = 10_000
_NOTATION = "E (embedding), t (decoder layer), L (loss), | (next stage), x*n and (xy)*n"


class StageProblem(ValueError):
    """A key of the stages that does not suit the model or the layout.

    Attributes:
        leaf: the key's name in the section `parallel`.
        value: its value.
        text: the problem.
    """

    def __init__(self, leaf: str, value: object, text: str) -> None:
        super().__init__(f"{leaf} = {value}: {text}")
        self.leaf, self.value, self.text = leaf, value, text

    def line(self, prefix: str) -> str:
        """Return the problem under the key's name in the recipe; see ``Stages.prefix``."""
        return f"{prefix}{self.leaf} = {self.value}: {self.text}"


@dataclass(frozen=True)
class Stages:
    """The keys of a model's pipeline stages; equal shares of the layers where all are None.

    Attributes:
        first: decoder layers on the first pipeline rank.
        last: decoder layers on the last pipeline rank.
        layout: the layers of each stage, in Megatron-Core's notation.
        prefix: of the keys' names in the recipe: "parallel." or "teacher.teacher_".
    """

    first: int | None = None
    last: int | None = None
    layout: str | None = None
    prefix: str = field(default="parallel.", compare=False)

    @classmethod
    def of_student(cls, parallel: ParallelSection) -> Stages:
        """Return the student's."""
        return cls(*(getattr(parallel, leaf) for leaf in STAGE_KEYS))

    @classmethod
    def of_teacher(cls, place: str, teacher: OneTeacher) -> Stages:
        """Return those of the local teacher at a key of the recipe."""
        first, last, layout = (getattr(teacher, f"teacher_{leaf}") for leaf in STAGE_KEYS)
        return cls(first, last, layout, prefix=f"{place}.teacher_")

    @property
    def are_equal(self) -> bool:
        """Whether no key is set."""
        return self == Stages()

    def problems(self, pipeline: int, virtual: int | None) -> Iterator[StageProblem]:
        """Yield what is wrong for every model.

        Args:
            pipeline: number of pipeline ranks.
            virtual: number of chunks on each; None for one.
        """
        values = dict(zip(STAGE_KEYS, (self.first, self.last, self.layout), strict=True))
        given = {leaf: value for leaf, value in values.items() if value is not None}
        for leaf, value in given.items():
            if pipeline == 1:
                yield StageProblem(leaf, value, "needs parallel.pipeline_model_parallel_size > 1")
            elif leaf != LAYOUT and virtual and int(str(value)) % virtual:
                text = f"must be a multiple of parallel.virtual_pipeline_model_parallel_size ({virtual})"
                yield StageProblem(leaf, value, text)
        if pipeline > 1 and self.layout is not None:
            if len(given) > 1:
                text = f"not beside {FIRST} and {LAST}; set the layout or these"
                yield StageProblem(LAYOUT, self.layout, text)
            else:
                yield from _layout_problems(self.layout, pipeline * (virtual or 1), is_virtual=virtual is not None)

    def layers(self, num_layers: int, pipeline: int, virtual: int | None = None) -> tuple[int, ...]:
        """Return the number of decoder layers of each chunk, in the model's order.

        Chunk v of pipeline rank p has the index v * pipeline + p.

        Args:
            num_layers: decoder layers of the model.
            pipeline: number of pipeline ranks.
            virtual: number of chunks on each; None for one.

        Raises:
            StageProblem: they do not add up to the model's, or can't be shared equally.
        """
        for problem in self.problems(pipeline, virtual):
            raise problem
        if self.layout is not None:
            counts = tuple(stage.count("t") for stage in _expand(self.layout).split("|"))
            if sum(counts) != num_layers:
                text = f"has {sum(counts)} decoder layers (t); the model has {num_layers}"
                raise StageProblem(LAYOUT, self.layout, text)
            return counts
        chunks = virtual or 1
        return tuple(size // chunks for size in self._ranks(num_layers, pipeline, chunks)) * chunks

    def _ranks(self, num_layers: int, pipeline: int, chunks: int) -> list[int]:
        """Return the number of layers of each pipeline rank, each a multiple of `chunks`."""
        ends = [size for size in (self.first, self.last) if size is not None]
        rest, ranks = num_layers - sum(ends), pipeline - len(ends)
        shares = ranks * chunks
        if rest < 0 or bool(rest) != bool(ranks) or (shares and rest % shares):
            if self.are_equal:
                leaf = "pipeline_model_parallel_size"
                raise StageProblem(leaf, pipeline, f"{num_layers} layers can't be shared by {shares} stages")
            leaf, value = (FIRST, self.first) if self.first is not None else (LAST, self.last)
            text = f"leaves {rest} of {num_layers} layers for {ranks} other pipeline ranks"
            if rest > 0 and ranks:
                text += f" of {chunks} stages each" if chunks > 1 else ""
                text += ", which can't share them equally"
            raise StageProblem(leaf, value, text)
        middle = [rest // ranks] * ranks if ranks else []
        return [*([] if self.first is None else [self.first]), *middle, *([] if self.last is None else [self.last])]


def _expand(layout: str) -> str:
    """Return a layout without commas and multiplications, by the rules of Megatron-Core."""
    layout = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda found: found[1] * int(found[2]), layout)
    return layout


def _layout_problems(layout: str, num_stages: int, *, is_virtual: bool) -> Iterator[StageProblem]:
    """Yield at most one problem of a layout that is meant for so many stages."""
    text = _describe_problem(layout, num_stages, is_virtual=is_virtual)
    if text is not None:
        yield StageProblem(LAYOUT, layout, text)


def _describe_problem(layout: str, num_stages: int, *, is_virtual: bool) -> str | None:
    if any(int(count) > _MOST_COPIES for count in re.findall(r"\*(\d+)", layout)):
        return f"repeats something more than {_MOST_COPIES} times"
    expanded = _expand(layout)
    unknown = sorted(set(expanded) - set("EtL|"))
    if "m" in unknown:
        return "has a layer for multi-token prediction (m), which is not trained here; leave it out"
    if unknown:
        return f"{' '.join(unknown)} can't be read; the notation has {_NOTATION}, without spaces"
    stages = expanded.split("|")
    if len(stages) != num_stages:
        sizes = "pipeline_model_parallel_size" + (" x virtual_pipeline_model_parallel_size" if is_virtual else "")
        return f"has {len(stages)} stages; it must have parallel.{sizes} = {num_stages}"
    if not stages[0].startswith("E") or not stages[-1].endswith("L") or [expanded.count(x) for x in "EL"] != [1, 1]:
        return "must begin with the one E and end with the one L"
    empty = [number for number, stage in enumerate(stages, start=1) if "t" not in stage]
    if not is_virtual:
        empty = [number for number in empty if number not in (1, num_stages)]
    if empty:
        which = "every stage" if is_virtual else "every stage but the first and the last"
        return f"stage {empty[0]} has no decoder layer (t); {which} needs one"
    return None
