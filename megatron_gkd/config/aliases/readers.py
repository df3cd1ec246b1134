"""Functions from a value under another tool's name to values of the recipe's leaves."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_gkd.config.aliases.entry import Values

Reader = Callable[[Any], Values]


def as_boolean(value: Any) -> bool:
    """Return true or false.

    Raises:
        ValueError: the value is neither.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("must be true or false")


def as_list(value: Any) -> list[Any]:
    """Return a list of one for a value that is none."""
    return list(value) if isinstance(value, list | tuple) else [value]


def one_of(leaf: str, values: Mapping[str, Any]) -> Reader:
    """Return a reader that translates the values of a leaf; null stays null."""

    def read(value: Any) -> Values:
        key = str(value).lower() if isinstance(value, bool) else str(value)
        if value is None:
            return {leaf: None}
        if key not in values:
            raise ValueError("must be one of " + ", ".join(values))
        return {leaf: values[key]}

    return read


def flag(when_true: Values, when_false: Values) -> Reader:
    """Return a reader of true and false."""
    return lambda value: when_true if as_boolean(value) else when_false


def opposite(leaf: str) -> Reader:
    """Return a reader for a leaf whose meaning is the opposite."""
    return lambda value: {leaf: not as_boolean(value)}


def unless(leaf: str, *nothing: Any) -> Reader:
    """Return a reader that takes the values `nothing` for null."""
    return lambda value: {leaf: None if value in nothing else value}


def entry(leaf: str, name: str) -> Reader:
    """Return a reader that makes the value an entry of a leaf that is a mapping."""
    return lambda value: {leaf: {name: value}}


def seconds(leaf: str) -> Reader:
    """Return a reader of minutes."""

    def read(value: Any) -> Values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number of minutes")
        return {leaf: value * 60}

    return read


def read_resume(value: Any) -> Values:
    """Read transformers' `resume_from_checkpoint`: a path, true for the newest, or false."""
    if value is None or value in (False, "false", "False"):
        return {"resume": "never"}
    return {"resume": "auto" if value in (True, "true", "True") else value}


def read_report_to(value: Any) -> Values:
    """Read transformers' `report_to`."""
    names = [str(name).lower() for name in as_list(value) if name is not None]
    others = [name for name in names if name not in ("tensorboard", "none", "no")]
    if others:
        raise ValueError("must be tensorboard or none; metrics are also written to output_dir/metrics.jsonl")
    return {"tensorboard": "tensorboard" in names}


def read_engine(values: Values) -> Values:
    """Read ms-swift's `use_vllm` and `vllm_mode`."""
    mode = values.get("vllm_mode")
    if mode not in (None, "colocate", "server"):
        raise ValueError("must be colocate or server")
    if not as_boolean(values.get("use_vllm", True)):
        return {"engine": "megatron"}
    return {"engine": "vllm_server" if mode == "server" else "vllm"}


def read_server_urls(values: Values) -> Values:
    """Read ms-swift's addresses of rollout servers, of which the base URLs stand for themselves."""
    urls = [str(url).rstrip("/") for url in as_list(values.get("vllm_server_base_url")) if url is not None]
    if urls:
        return {"vllm_server_urls": urls}
    hosts = [str(host) for host in as_list(values.get("vllm_server_host")) if host is not None]
    ports = as_list(values.get("vllm_server_port", 8000))
    if not hosts:
        raise ValueError("needs vllm_server_host")
    if len(ports) == 1:
        ports *= len(hosts)
    if len(ports) != len(hosts):
        raise ValueError(f"must be as many ports as there are hosts ({len(hosts)})")
    return {"vllm_server_urls": [f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True)]}


GROUPS: dict[str, Reader] = {"engine": read_engine, "servers": read_server_urls}
"""Readers of several names together, by the group of their aliases."""
