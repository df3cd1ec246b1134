"""Figures of GPUs and their links, by name, or from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_gkd.errors import UserError


class Device(BaseModel):
    """One GPU with its links. Rates are peaks, in one direction; GB are 10^9 bytes.

    Attributes:
        name: as printed.
        memory_gb: its memory.
        bf16_tflops: dense matrix products in bf16 with fp32 accumulation.
        memory_gb_s: between the GPU and its memory.
        nvlink_gb_s: to the other GPUs of the node, all together.
        network_gb_s: to other nodes.
        host_gb_s: to the node's memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    memory_gb: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    memory_gb_s: float = Field(gt=0)
    nvlink_gb_s: float = Field(gt=0)
    network_gb_s: float = Field(gt=0)
    host_gb_s: float = Field(gt=0)


def _device(name: str, memory: float, tflops: float, *gb_s: float) -> Device:
    bandwidth, nvlink, network, host = gb_s
    return Device(
        name=name,
        memory_gb=memory,
        bf16_tflops=tflops,
        memory_gb_s=bandwidth,
        nvlink_gb_s=nvlink,
        network_gb_s=network,
        host_gb_s=host,
    )


DEVICES = {
    # NVIDIA A100 data sheet (June 2021): 312 TFLOPS bf16 dense, 2039 GB/s; in both directions NVLink 600 GB/s and
    # PCIe 4.0 64 GB/s. Network: DGX A100 data sheet, one 200 Gb/s adapter for each GPU.
    "a100": _device("NVIDIA A100 SXM 80 GB", 80, 312, 2039, 300, 25, 32),
    # NVIDIA H100 data sheet (SXM): 1979 TFLOPS bf16 with sparsity, 3.35 TB/s; in both directions NVLink 900 GB/s and
    # PCIe 5.0 128 GB/s. Network: DGX H100 data sheet, one 400 Gb/s adapter for each GPU.
    "h100": _device("NVIDIA H100 SXM 80 GB", 80, 989, 3350, 450, 50, 64),
    # NVIDIA H200 data sheet (SXM): 1979 TFLOPS bf16 with sparsity, 141 GB, 4.8 TB/s; NVLink and PCIe as the H100.
    # Network: DGX H200 data sheet, one 400 Gb/s adapter for each GPU.
    "h200": _device("NVIDIA H200 SXM 141 GB", 141, 989, 4800, 450, 50, 64),
    # NVIDIA DGX B200 data sheet, for each of 8 GPUs: 1440 GB, 64 TB/s and 14.4 TB/s of NVLink together; 2.25 PFLOPS
    # bf16 dense (data sheet of HGX B200); PCIe 5.0. Network: one 400 Gb/s adapter for each GPU.
    "b200": _device("NVIDIA B200 SXM 180 GB", 180, 2250, 8000, 900, 50, 64),
    # NVIDIA GB200 NVL72 data sheet, for each of 72 GPUs: 13.4 TB, 576 TB/s, NVLink 130 TB/s, 360 PFLOPS bf16 with
    # sparsity together; NVLink-C2C 900 GB/s in both directions for two GPUs. Network: a 400 Gb/s adapter for each
    # GPU.
    "gb200": _device("NVIDIA GB200 186 GB", 186, 2500, 8000, 900, 50, 225),
    # NVIDIA L40S data sheet: 362 TFLOPS bf16 dense, 48 GB, 864 GB/s, PCIe 4.0 64 GB/s in both directions, no NVLink.
    # Network: an assumption, one 200 Gb/s adapter for each GPU.
    "l40s": _device("NVIDIA L40S 48 GB", 48, 362, 864, 32, 25, 32),
}


def find_device(name: str) -> Device:
    """Return the device of a name in `DEVICES`, or the one that a YAML file describes.

    Raises:
        UserError: there is none, or the file does not describe one.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    if Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"--device = {name}: unknown; must be {', '.join(DEVICES)}, or a .yaml file with its figures")
    return _read(name)


def _read(path: str) -> Device:
    fields = ", ".join(Device.model_fields)
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return Device.model_validate(content)
    except OSError as error:
        raise UserError(f"--device = {path}: can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--device = {path}: not YAML: {' '.join(str(error).split())}; must have {fields}") from error
    except ValidationError as invalid:
        first = invalid.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        raise UserError(f"--device = {path}: {key}: {first['msg']}; must have {fields}") from invalid
