"""Data files -> checked rows -> tokenized samples -> packed microbatches.

Importing this package loads nothing heavy, so that a plugin file may import `register_preprocessor` from it.
"""

from megatron_gkd.data.plugins import register_preprocessor

__all__ = ["register_preprocessor"]
