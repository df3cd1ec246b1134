"""Data files to a tokenised, memory-mapped dataset."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.cache import CacheFolder, default_cache_dir, fingerprint, hash_tokenizer
from megatron_gkd.data.plugins import find_preprocessor, load_plugins
from megatron_gkd.data.prompt import PromptLimits
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import FROM_DATASET, Sample
from megatron_gkd.data.sources import Source, open_source
from megatron_gkd.data.tokenizing import BLANK, FEATURES, RowTokenizer
from megatron_gkd.errors import UserError

_ROWS, _REPORT = "rows", "report.json"  # names in a cache folder


class DataFile(Protocol):
    path: str
    weight: float


class DataSection(Protocol):
    """The recipe's `data` section, as far as this package reads it."""

    dataset: Sequence[DataFile]
    val_dataset: Sequence[DataFile]
    max_length: int
    teacher_max_length: int | None
    truncation_strategy: Literal["delete", "left", "right"]
    loss_on: Literal["last", "all"]
    data_errors: Literal["raise", "skip"]
    preprocessor: str | None
    external_plugins: Sequence[str]
    chat_template_kwargs: dict[str, Any]
    preprocessing_num_workers: int
    dataset_cache_dir: str | None


class TokenizedDataset:
    """Samples of one or more sources, one after the other, read from memory-mapped Arrow files.

    Attributes:
        sizes: number of samples of each source.
        lengths: int64 [rows], tokens of each sample.
        num_labels: int64 [rows], labels of each sample that are not -100.
        teacher_lengths: int64 [rows], tokens of each sample as the teacher reads it, where that has a prompt of its
            own; else 0.
        tags: the tags that rows have.
    """

    def __init__(self, parts: Sequence[datasets.Dataset]) -> None:
        self._rows = datasets.concatenate_datasets(list(parts)).with_format("numpy")
        self.sizes = [len(part) for part in parts]
        self.lengths = _column(self._rows, "length")
        self.num_labels = _column(self._rows, "num_labels")
        self.teacher_lengths = _column(self._rows, "teacher_length")
        self.tags = frozenset(tag for tag in self._rows.unique("tag") if tag)

    def __len__(self) -> int:
        return len(self._rows)

    def first_row_with_tag(self, tag: str) -> int:
        """ValueError if none has it."""
        return list(self._rows["tag"]).index(tag)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[int(index)]
        input_ids, labels = row["input_ids"].astype(np.int64), row["labels"].astype(np.int64)
        teacher_prompt = row["teacher_prompt"].astype(np.int64) if self.teacher_lengths[index] else None
        return Sample(input_ids, labels, FROM_DATASET, int(index), teacher_prompt, str(row["tag"]) or None)


def build_dataset(
    section: DataSection,
    split: Literal["train", "validation"],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: bool = False,
    prompt_limits: PromptLimits | None = None,
    tag_key: str | None = None,
    vocab_size: int | None = None,
    main_process: bool,
    barrier: Callable[[], None],
) -> tuple[TokenizedDataset, DataReport]:
    """Reads, checks and tokenises the rows of a split; takes them from the cache where nothing has changed.

    Every process calls this. The main one builds the cache while the others wait at `barrier`; then all open it. Where
    building fails, every process raises the same error.

    Args:
        section: the recipe's data section.
        split: "train" reads `section.dataset`, "validation" `section.val_dataset`.
        tokenizer: the student's, a fast one.
        prompts: a row may be a prompt alone, for the student to answer.
        prompt_limits: prompts that are longer are shortened, or their rows left out, by `truncation_strategy`; None
            where the student answers no row.
        tag_key: the rows' key whose value is `Sample.tag`; every row must have it.
        vocab_size: rows of token ids have ids below it; None: below the number of the tokenizer's tokens.
        main_process: true in exactly one of the processes that share the cache folder.
        barrier: returns when every process has called it.

    Raises:
        UserError: a file cannot be read, a row is bad and `data_errors` is "raise", a source has no usable row.
    """
    files = section.dataset if split == "train" else section.val_dataset
    if not files:
        raise UserError(f"data.{'dataset' if split == 'train' else 'val_dataset'} names no file")
    root = Path(section.dataset_cache_dir).expanduser() if section.dataset_cache_dir else default_cache_dir()
    tokenizer_hash = hash_tokenizer(tokenizer)
    plugins = list(section.external_plugins)
    limits = None if prompt_limits is None else asdict(prompt_limits)
    options = _options(section) | {
        "prompts": prompts,
        "prompt_limits": limits,
        "tag_key": tag_key,
        "vocab_size": vocab_size,
    }
    keys = [fingerprint(file.path, tokenizer_hash, options, plugins) for file in files]
    caches = [CacheFolder(root / key) for key in keys]

    failure = None
    if main_process:
        try:
            for file, cache in zip(files, caches, strict=True):
                cache.build(lambda folder, path=file.path: _write(path, section, tokenizer, options, folder))
        except Exception as error:  # the others must be let out of the barrier whatever went wrong
            failure = error
    barrier()
    if failure is not None:
        raise failure
    folders = [cache.open() for cache in caches]
    dataset = TokenizedDataset([datasets.load_from_disk(str(folder / _ROWS)) for folder in folders])
    return dataset, DataReport.merge(DataReport(**json.loads((folder / _REPORT).read_text())) for folder in folders)


def _options(section: DataSection) -> dict[str, Any]:
    """What decides, beside the file, the tokenizer and the plugins, which samples a source yields."""
    names = ("max_length", "teacher_max_length", "truncation_strategy", "loss_on", "data_errors", "preprocessor")
    return {name: getattr(section, name) for name in (*names, "chat_template_kwargs")}


def _write(
    path: str, section: DataSection, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], folder: Path
) -> None:
    """Writes the samples of the source at `path`, and its report, into `folder`."""
    load_plugins(section.external_plugins)
    if section.preprocessor:
        find_preprocessor(section.preprocessor)  # an unknown name is an error here, not in each worker
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _progress_bars_on_terminal_only():
        source = open_source(path, scratch)
        if len(source.table) == 0:
            raise UserError(f"{path}: yields nothing to train on: it has no rows")
        rows = _tokenize(source, section, tokenizer, options, Path(scratch))
        dropped = np.array(rows["dropped"], dtype=object)
        report = _report(source, rows, dropped, section.data_errors)
        used = rows.select(np.flatnonzero(dropped == ""))
        used.remove_columns(["shortened", "dropped", "error"]).save_to_disk(str(folder / _ROWS))
    (folder / _REPORT).write_text(json.dumps(asdict(report)), encoding="utf-8")


def _tokenize(
    source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], scratch: Path
) -> datasets.Dataset:
    tokenize = RowTokenizer(
        tokenizer=tokenizer,
        is_json=source.is_json,
        max_length=section.max_length,
        truncation_strategy=section.truncation_strategy,
        loss_on=section.loss_on,
        preprocessor=section.preprocessor,
        external_plugins=list(section.external_plugins),
        template_kwargs=dict(section.chat_template_kwargs),
        prompts=options["prompts"],
        prompt_limits=options["prompt_limits"] and PromptLimits(**options["prompt_limits"]),
        teacher_max_length=section.teacher_max_length,
        tag_key=options["tag_key"],
        vocab_size=options["vocab_size"],
    )
    workers = min(section.preprocessing_num_workers, len(source.table))
    return source.table.map(
        tokenize,
        batched=True,
        batch_size=256,
        remove_columns=source.table.column_names,
        features=FEATURES,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(scratch / "tokenized.arrow"),
        load_from_cache_file=False,
        new_fingerprint=scratch.parent.name[:32],  # else the tokenizer is pickled and hashed
        desc=f"Tokenising {Path(source.path).name}",
    )


def _report(source: Source, rows: datasets.Dataset, dropped: np.ndarray, data_errors: str) -> DataReport:
    """Counts the rows; UserError for bad ones that may not be skipped, and for a source that has none to use."""
    errors = np.array(rows["error"], dtype=object)
    bad = np.flatnonzero(errors != "")
    first = f"{source.locate(int(bad[0]))}: {errors[bad[0]]}" if len(bad) else None
    if first and data_errors == "raise":
        more = f" ({len(bad)} bad rows in all; data_errors: skip leaves them out)"
        raise UserError(first + more)
    reasons, counts = np.unique(dropped[(dropped != "") & (dropped != BLANK)].astype(str), return_counts=True)
    by_reason = dict(zip(reasons.tolist(), counts.tolist(), strict=True))
    used = int((dropped == "").sum())
    shortened = int(np.sum(rows["shortened"]))
    report = DataReport(used + sum(by_reason.values()), used, by_reason, shortened, first)
    if used == 0:
        raise UserError(f"{source.path}: yields nothing to train on: {report.summary()}")
    return report


def _column(rows: datasets.Dataset, name: str) -> np.ndarray:
    return np.asarray(rows.with_format("arrow")[:][name], dtype=np.int64) if len(rows) else np.zeros(0, np.int64)


@contextmanager
def _progress_bars_on_terminal_only() -> Iterator[None]:
    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
