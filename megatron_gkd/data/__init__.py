"""Data files -> checked rows -> tokenized samples -> packed microbatches.

Importing this package loads nothing heavy: plugin files import `register_preprocessor` and `register_dataset` from it.
"""

from megatron_gkd.data.plugins import register_dataset, register_preprocessor

__all__ = ["register_dataset", "register_preprocessor"]
