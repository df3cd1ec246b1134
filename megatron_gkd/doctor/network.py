"""The hub, the names of this machine, and the network interfaces that variables name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from megatron_gkd.config.schema import Recipe
from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.storage import hub_cache
from megatron_gkd.doctor.subject import Subject

_HUB_SECONDS = 5.0
_MODELSCOPE = "https://www.modelscope.cn"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def find_hub(subject: Subject) -> Iterator[Finding]:
    """Request the hub's front page, unless it is switched off; report models of the recipe that would be missing."""
    if subject.recipe is not None and not subject.recipe.student.use_hf:
        yield from _find_modelscope(subject.recipe)
        return
    missing = (
        [] if subject.recipe is None else [model for model in _hub_models(subject.recipe) if not _is_cached(model)]
    )
    download = f"download them where the hub is reachable, into HF_HUB_CACHE: {', '.join(missing)}"
    switches = [name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if switches:
        text = f"switched off by {switches[0]}"
        if missing:
            yield Finding("hub", "failed", f"{text}, and the cache lacks {', '.join(missing)}", download)
        else:
            yield Finding("hub", "ok", f"{text}: models must be in the cache")
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    problem = _problem_of(address)
    if problem is None:
        yield Finding("hub", "ok", f"{address} is reachable")
    elif missing:
        yield Finding("hub", "failed", f"{address} {problem}, and the cache lacks {', '.join(missing)}", download)
    else:
        remedy = "set HF_HUB_OFFLINE=1 where models are folders or in the cache: the start waits for no hub"
        yield Finding("hub", "warning", f"{address} {problem}", remedy)


def _find_modelscope(recipe: Recipe) -> Iterator[Finding]:
    """Request ModelScope's front page, where the recipe names models of it."""
    models = _hub_models(recipe)
    if not models:
        yield Finding("hub", "ok", "ModelScope: the recipe's models are folders")
        return
    problem = _problem_of(_MODELSCOPE)
    if problem is None:
        yield Finding("hub", "ok", f"{_MODELSCOPE} is reachable")
    else:
        remedy = f"download them where the hub is reachable, into MODELSCOPE_CACHE: {', '.join(models)}"
        yield Finding("hub", "warning", f"{_MODELSCOPE} {problem}; models must be in the cache", remedy)


def _problem_of(address: str) -> str | None:
    """Return why a hub can't be used; None where it responds."""
    try:
        status = httpx.head(address, timeout=_HUB_SECONDS, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"is not reachable ({type(error).__name__})"
    return f"responds with status {status}" if status >= 500 else None


def _hub_models(recipe: Recipe) -> list[str]:
    """Return the models that the recipe names by an id of the hub."""
    named = [recipe.student.model, *(teacher.teacher_model for teacher in recipe.teacher.all.values())]
    return [model for model in dict.fromkeys(named) if model is not None and not Path(model).exists()]


def _is_cached(model: str) -> bool:
    """Return whether a snapshot has weights; `megatron-gkd plan` downloads config.json alone."""
    snapshots = (hub_cache() / f"models--{model.replace('/', '--')}" / "snapshots").glob("*")
    return any((one / "config.json").exists() and any(one.glob("*.safetensors")) for one in snapshots)


def find_host_name(_: Subject) -> Iterator[Finding]:
    """Resolve this machine's name, by which gloo and the nodes of a run find it, and bind a port there."""
    name = socket.gethostname()
    remedy = f"add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface of the nodes' network"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield Finding("host name", "warning", f"{name} can't be resolved: {error.strerror}", remedy)
        return
    for host in dict.fromkeys(("127.0.0.1", address)):
        try:
            with socket.create_server((host, 0)):
                pass
        except OSError as error:
            yield Finding("host name", "failed", f"no port can be opened on {host}: {error.strerror}", remedy)
            return
    yield Finding("host name", "ok", f"{name} is {address}; ports can be opened there")


def find_interfaces(_: Subject) -> Iterator[Finding]:
    """Compare the interfaces that variables of gloo and NCCL name with those of this machine."""
    present = sorted(psutil.net_if_addrs())
    for variable in _INTERFACES:
        value = os.environ.get(variable)
        if not value:
            continue
        is_exact, is_excluded = value.startswith("="), value.startswith("^")
        names = value.lstrip("=^").split(",")
        lacking = [
            name for name in names if not any(one == name if is_exact else one.startswith(name) for one in present)
        ]
        if lacking and not is_excluded:
            remedy = f"name one of {', '.join(present)}, or unset it"
            yield Finding(variable, "failed", f"{variable} = {value}: no such interface here", remedy)
        else:
            yield Finding(variable, "ok", value)
