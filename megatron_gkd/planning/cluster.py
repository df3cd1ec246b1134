"""The machines of a planned run, and what is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gkd.planning.devices import Device

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """What is assumed and not measured.

    Attributes:
        reserve: bytes of each GPU for what is not measured: CUDA's context, buffers of NCCL, fragmentation.
        mfu: share of the peak FLOP/s that matrix products reach.
        bandwidth_efficiency: share of each bandwidth that is reached.
        vllm_step_s: time of one decoding step of vLLM beside its reads of memory, in seconds.
        embedded_layer_s: time of one layer in a decoding step of the embedded engine beside its reads, in seconds: its
            kernels are started one by one.
    """

    reserve: int = 6 * GIB
    mfu: float = 0.5
    bandwidth_efficiency: float = 0.75
    vllm_step_s: float = 0.003
    embedded_layer_s: float = 0.0004


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run, one process each.

    Attributes:
        gpus: all of them.
        gpus_per_node: those of a node, between which links are fast.
        device: each of them.
        gpu_memory: bytes of each.
    """

    gpus: int
    gpus_per_node: int
    device: Device
    gpu_memory: int


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches, in FLOPs or bytes a second.

    Attributes:
        flops: of matrix products.
        memory: of its own memory.
        nvlink: to the other GPUs of the node.
        network: to other nodes.
        host: to the node's memory.
    """

    flops: float
    memory: float
    nvlink: float
    network: float
    host: float

    @classmethod
    def of(cls, device: Device, assumptions: Assumptions) -> Rates:
        """Return the rates of a device under the assumed efficiency."""
        share = assumptions.bandwidth_efficiency * GB
        return cls(
            flops=device.bf16_tflops * 1e12 * assumptions.mfu,
            memory=device.memory_gb_s * share,
            nvlink=device.nvlink_gb_s * share,
            network=device.network_gb_s * share,
            host=device.host_gb_s * share,
        )
