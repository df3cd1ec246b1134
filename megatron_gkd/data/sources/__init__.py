"""Rows as they were written: files, folders, URLs and data sets of hubs, as `datasets` tables of undecoded rows.

JSON rows stay text until a worker parses them: rows of one file may then differ in their keys and in the schemas of
their tools, which one Arrow schema could not hold, and a line that is not JSON is reported by its number.
"""

from megatron_gkd.data.sources.opening import describe_source, open_source
from megatron_gkd.data.sources.source import TEXT, Part, Source, drop_nulls

__all__ = ["TEXT", "Part", "Source", "describe_source", "drop_nulls", "open_source"]
