"""What a measurement was taken on and with."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import megatron_gkd
from megatron_gkd.ops import implementation

PACKAGES = ("triton", "liger-kernel", "trl", "ms-swift")


def describe(device: torch.device) -> dict:
    """Return device, date, versions and load, for JSON."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.date.today().isoformat(),
        "release": megatron_gkd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "implementation": implementation(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()} CPU"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def file_stem(kind: str, environment: dict) -> str:
    """Return a name such as `loss_nvidia-h100-80gb-hbm3_0.1.0`: of one device and release."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return f"{kind}_{device}_{environment['release']}"
