"""A recipe that is being written from another tool's settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.checks.rollout import OF_THE_ENGINE, OF_THE_SERVERS
from megatron_gkd.config.schema import Recipe, RolloutSection

_PLACEHOLDER = "placeholder"


@dataclass(frozen=True)
class Skipped:
    """A setting that the recipe does not have.

    Attributes:
        name: as the tool writes it.
        value: its value.
        reason: why.
    """

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name} = {show(self.value)}: {self.reason}"


@dataclass
class Draft:
    """The recipe so far, and what its user has to know.

    Attributes:
        leaves: values by leaf.
        skipped: the settings that are not carried over.
        notes: what is different here, one text each.
        nproc: processes on a node; None where the source does not say.
        nodes: number of nodes.
        environment: variables to start the run with.
    """

    leaves: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    nproc: int | None = None
    nodes: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes of the run on all nodes."""
        return (self.nproc or 1) * self.nodes

    def skip(self, name: str, value: Any, reason: str) -> None:
        """Note a setting that is not carried over."""
        self.skipped.append(Skipped(name, value, reason))

    def fill(self, defaults: dict[str, Any]) -> None:
        """Write the tool's defaults of leaves that have no value."""
        self.leaves = defaults | self.leaves

    def drop(self, leaf: str, reason: str) -> None:
        """Remove a leaf that has a value, and note it."""
        if leaf in self.leaves:
            self.skip(f"{keys.SECTION_OF[leaf]}.{leaf}", self.leaves.pop(leaf), reason)

    def drop_validation_without_rows(self) -> None:
        """Remove keys of validations where there are no rows for them."""
        if not self.leaves.get("val_dataset") and not self.leaves.get("split_dataset_ratio"):
            for leaf in ("eval_interval", "eval_iters"):
                self.drop(leaf, "there are no rows to validate on (data.val_dataset)")

    def drop_keys_of_other_engines(self) -> None:
        """Remove keys of vLLM beside the engine that samples; scripts keep them for the day that they change it."""
        engine = self.leaves.get("engine", RolloutSection.model_fields["engine"].default)
        for leaves, needed in ((OF_THE_ENGINE, "vllm"), (OF_THE_SERVERS, "vllm_server")):
            for leaf in leaves if engine != needed else ():
                if self.leaves.get(leaf) == RolloutSection.model_fields[leaf].default:
                    self.leaves.pop(leaf, None)
                self.drop(leaf, f"only with rollout.engine = {needed}, not {engine}")

    def tree(self) -> dict[str, dict[str, Any]]:
        """Return the leaves by section, in the order of the schema."""
        return {
            section: found
            for section, leaves in keys.SECTIONS.items()
            if (found := {leaf: self.leaves[leaf] for leaf in leaves if leaf in self.leaves})
        }

    def drop_invalid(self) -> list[str]:
        """Remove values that the schema refuses.

        Returns:
            The leaves that must be added before the recipe can be used.
        """
        missing: list[str] = []
        while True:
            tree: dict[str, Any] = {section: {} for section in keys.SECTIONS if section not in keys.NULLABLE_SECTIONS}
            tree |= self.tree()
            for leaf in missing:
                tree[keys.SECTION_OF[leaf]][leaf] = _PLACEHOLDER
            try:
                Recipe.model_validate(tree)
            except ValidationError as error:
                leaf, kind = str(error.errors()[0]["loc"][1]), error.errors()[0]["type"]
            else:
                return missing
            if kind == "missing" and leaf not in self.leaves:
                missing.append(leaf)
            else:
                self.drop(leaf, f"must be {keys.describe_allowed(keys.find_field(leaf))}")


def show(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, str):
        return " ".join(value.split()) or "''"
    if isinstance(value, list):
        return " ".join(map(show, value))
    text = yaml_text.dump(value).split("\n")[0] if not isinstance(value, dict) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
