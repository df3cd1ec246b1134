"""The names that other tools give to settings: aliases of the recipe's keys, settings that hold anyway, and others.

A recipe or command line may use an alias in place of its key. The recipe itself has the keys alone: `translate_names`
puts their values in place of the aliases before anything else is checked.
"""

from megatron_gkd.config.aliases.held import HELD
from megatron_gkd.config.aliases.names import ALIASES, VALUES
from megatron_gkd.config.aliases.translate import (
    Translation,
    alias_values,
    is_other_name,
    translate_names,
)
from megatron_gkd.config.aliases.unsupported import SECTIONS, UNSUPPORTED

__all__ = [
    "ALIASES",
    "HELD",
    "SECTIONS",
    "UNSUPPORTED",
    "VALUES",
    "Translation",
    "alias_values",
    "is_other_name",
    "translate_names",
]
