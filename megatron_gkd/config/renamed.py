"""Keys of the recipe under their former names, which recipes and command lines may still use."""

import warnings
from collections.abc import Iterator
from typing import Any

RENAMED = {
    "teacher": {
        "kind": "teacher_kind",
        "cache": "teacher_cache",
        "ema": "teacher_ema",
        "teacher_server_patience_s": "teacher_server_max_downtime_s",
    },
    "rollout": {
        "stop": "stop_words",
        "truncated": "truncated_completions",
        "server_concurrency": "vllm_server_concurrency",
        "server_timeout_s": "vllm_server_timeout_s",
        "server_patience_s": "vllm_server_max_downtime_s",
    },
    "data": {"loss_on": "loss_scale"},
    "train": {"attn": "attention_backend"},
}
"""By section, the present name of each former one. Former names are unique over all sections, as leaves are."""

_VALUES: dict[str, dict[Any, Any]] = {"data.loss_scale": {"last": "last_round", "all": "default"}}
"""By the present name of a key, the present value of each that it had under its former name."""

NEW_NAMES = {old: new for names in RENAMED.values() for old, new in names.items()}


class DeprecatedKey(FutureWarning):
    """A recipe or command line uses a key under its former name."""


def rename_keys(tree: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Give the keys of `tree` (section -> leaf -> value) their present names, with a DeprecatedKey for each.

    Returns:
        The problems, and the leaves that they concern: those that occur under both names.
    """
    problems: list[str] = []
    concerned: set[str] = set()
    for section, names in RENAMED.items():
        for place, content in _mappings(section, tree.get(section)):
            for old in [name for name in content if name in names]:
                value, new = content.pop(old), names[old]
                if new in content:
                    problems.append(f"{place}.{old} = {value}: is the former name of {place}.{new}; remove {old}")
                    concerned.add(new)
                    continue
                content[new] = _current(f"{section}.{new}", value)
                warnings.warn(f"{place}.{old}: deprecated; use {place}.{new}", DeprecatedKey, stacklevel=3)
    return problems, concerned


def current_key(key: str) -> str:
    """Return a key under its present name: `teacher.teachers[0].teacher_kind` for `teacher.teachers[0].kind`."""
    place, _, leaf = key.rpartition(".")
    names = RENAMED.get(place.partition(".")[0], {})
    return f"{place}.{names[leaf]}" if leaf in names else key


def current_value(key: str, value: Any) -> Any:
    """Return the present value of `key`, a former name: that of `current_key(key)`."""
    current = current_key(key)
    return value if current == key else _current(current, value)


def _current(key: str, value: Any) -> Any:
    return _VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _mappings(section: str, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a section and the mappings in its lists (`teacher.teachers`), each with its place in the recipe."""
    if not isinstance(content, dict):
        return
    yield section, content
    for leaf, value in content.items():
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, dict):
                yield f"{section}.{leaf}[{index}]", entry
