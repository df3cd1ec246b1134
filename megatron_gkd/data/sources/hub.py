"""Data sets of the hubs, and folders that are copies of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import datasets

from megatron_gkd.config.dataset_names import DatasetName
from megatron_gkd.data.sources.files import reason_of, without_decoding
from megatron_gkd.errors import UserError

T = TypeVar("T")


def load_hub(name: DatasetName, *, use_hf: bool) -> datasets.Dataset:
    """Load a data set by its id or from a folder that is a copy of its repository; what is cached is not fetched again.

    A single part after the id is a subset or, where there is no such subset, a split.

    Args:
        name: of the data set.
        use_hf: whether ids are those of Hugging Face's hub, or of ModelScope.

    Raises:
        UserError: it cannot be loaded.
    """
    is_hf = _is_hugging_face(name, use_hf=use_hf)
    load = _load_from_hugging_face if is_hf else _load_from_modelscope
    return without_decoding(_try_parts(name, load, is_hf=is_hf).with_format(None))


def stream_hub(name: DatasetName, *, use_hf: bool) -> tuple[datasets.IterableDataset, list[Any]] | None:
    """Return the rows of a data set of Hugging Face, or of a folder that is a copy of one, and what changes with them.

    None for a data set of ModelScope. The arguments and errors are those of `load_hub`.
    """
    if not _is_hugging_face(name, use_hf=use_hf):
        return None
    table, state = _try_parts(name, _stream_from_hugging_face, is_hf=True)
    return without_decoding(table), state


def _is_hugging_face(name: DatasetName, *, use_hf: bool) -> bool:
    return name.kind == "path" or (use_hf if name.hub is None else name.hub == "HF")


def _try_parts(name: DatasetName, load: Callable[[str, str | None, str], T], *, is_hf: bool) -> T:
    attempts = [(name.subset, name.split or "train")]
    if name.subset is not None and name.split is None:
        attempts.append((None, name.subset))
    reasons = []
    for subset, split in attempts:
        try:
            return load(name.location, subset, split)
        except UserError:
            raise
        except Exception as error:  # of the hub's library, the network, or a damaged file
            reasons.append(reason_of(error))
    reason = reasons[0]
    if len(set(reasons)) > 1:
        reason = f"{name.subset} as a subset: {reasons[0]}; as a split: {reasons[1]}"
    if name.kind == "path":
        raise UserError(f"{name.text}: cannot be read as a copy of a hub's data set: {reason}")
    hub = "Hugging Face" if is_hf else "ModelScope"
    raise UserError(
        f"{name.text}: no such file or folder, and no data set of {hub} that can be read: {reason}; must be a file or "
        "folder that exists, or a hub id (owner/name[:subset][:split])"
    )


def _load_from_hugging_face(location: str, subset: str | None, split: str) -> datasets.Dataset:
    return datasets.load_dataset(location, subset, split=split)


def _stream_from_hugging_face(
    location: str, subset: str | None, split: str
) -> tuple[datasets.IterableDataset, list[Any]]:
    builder = datasets.load_dataset_builder(location, subset)
    return builder.as_streaming_dataset(split=split), [location, subset, split, builder.hash]


def _load_from_modelscope(location: str, subset: str | None, split: str) -> datasets.Dataset:
    try:
        from modelscope import MsDataset
    except (ImportError, RuntimeError) as error:  # RuntimeError: modelscope is there without what its data sets need
        reason = str(error).strip().rpartition("\n")[2]
        raise UserError(
            f"{location}: data sets of ModelScope need its library ({reason}): pip install 'modelscope[datasets]'; or "
            "set student.use_hf to true"
        ) from error
    options = {} if subset is None else {"subset_name": subset}
    loaded: Any = MsDataset.load(location, split=split, **options)
    return loaded.to_hf_dataset() if hasattr(loaded, "to_hf_dataset") else loaded
