"""Build of the tokenized dataset of a split, by one process of each node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.cache import CacheFolder, default_cache_dir
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.entries import Entry, read_entries
from megatron_gkd.data.plugins import load_plugins
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.tokenized_source import SourceTokenization, describe_other_rows, open_samples, read_report
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import UserError
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.nodes import Nodes

VISIBLE_WITHIN_S = 5.0  # how long another node may take to see a folder of a shared file system


def build_dataset(
    section: DataSection,
    split: Literal["train", "validation"],
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions | None = None,
    nodes: Nodes | None = None,
) -> tuple[TokenizedDataset, DataReport]:
    """Read, check and tokenize the rows of a split, or open them from the cache where nothing has changed.

    All ranks must call it. Rank 0 builds the cache while the others wait; then one rank of each node that does not see
    rank 0's cache builds its own; then all open it. The failure of one rank is raised in all.

    Args:
        section: the recipe's data section.
        split: "train" reads `section.dataset`, "validation" `section.val_dataset`; see also `split_dataset_ratio`.
        tokenizer: the student's, a fast one.
        options: what the run requires of its rows; None for the defaults.
        nodes: the ranks; None for one process.

    Raises:
        UserError: a file cannot be read, a row is bad and `data_errors` is "raise", a source has no usable row, or a
            node has other rows than rank 0.
    """
    options = options or RowOptions()
    nodes = nodes or Nodes.alone()
    entries = nodes.on_all(lambda: _read_entries(section, split, options))
    root = Path(section.dataset_cache_dir).expanduser() if section.dataset_cache_dir else default_cache_dir()
    tokenization = SourceTokenization(section, tokenizer, options)
    # The key has the time of change of rank 0's files; copies on other nodes may have another.
    keys = nodes.on_main(lambda: tokenization.keys(entries))
    caches = [CacheFolder(root / key) for key in keys]

    def build() -> list[str]:
        for entry, cache in zip(entries, caches, strict=True):
            cache.build(partial(tokenization.write, entry, is_main=True))
        return [read_report(cache).digest for cache in caches]

    def build_unseen() -> None:
        until = time.monotonic() + VISIBLE_WITHIN_S
        for entry, cache, digest in zip(entries, caches, digests, strict=True):
            if not cache.is_visible(until):
                cache.build(partial(tokenization.write, entry, digest=digest))

    digests = nodes.on_main(build)
    with phase("Waiting for the other nodes to tokenize the rows", is_main=nodes.is_main):
        nodes.on_leaders(build_unseen)
    return nodes.on_all(lambda: _open([entry.name.text for entry in entries], caches, digests))


def _read_entries(section: DataSection, split: Literal["train", "validation"], options: RowOptions) -> list[Entry]:
    load_plugins(section.external_plugins)
    entries = read_entries(section, split, seed=options.seed, tag_key=options.tag_key)
    if not entries:
        raise UserError(f"data.{'dataset' if split == 'train' else 'val_dataset'} names no file")
    for entry in entries:
        entry.options.find_preprocessor()  # an unknown name is an error here, not in each worker
    return entries


def _open(
    names: Sequence[str], caches: Sequence[CacheFolder], digests: Sequence[str]
) -> tuple[TokenizedDataset, DataReport]:
    """Open the caches of the sources of these names, whose rows must have the `digests`."""
    until = time.monotonic() + VISIBLE_WITHIN_S
    for name, cache, digest in zip(names, caches, digests, strict=True):
        if not cache.is_visible(until):
            raise UserError(
                f"data.dataset_cache_dir = {cache.folder.parent}: {cache.folder.name} is missing, although a rank of "
                "this node has written it; name a folder that all ranks of a node see"
            )
        if read_report(cache).digest != digest:
            raise UserError(f"{describe_other_rows(name)}. Remove {cache.folder} on this node before the next start")
    stored = [read_report(cache) for cache in caches]
    dataset = TokenizedDataset([open_samples(cache) for cache in caches], digests, [one.files for one in stored])
    return dataset, DataReport.of_sources(names, [one.report for one in stored])
