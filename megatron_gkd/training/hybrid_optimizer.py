"""Megatron's hybrid optimizer, which updates a share of the parameters in host memory, with its defects worked around.

`HostOptimizer` works where torch has no GPU, with fp32 parameters, and before the first step; see
``docs/upstream_defects.md`` for each defect of `HybridDeviceOptimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime import portability

import megatron.core.optimizer as optimizer_package
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_SAVED = frozenset({"lr", "weight_decay", "betas", "eps"})


def install_hybrid_optimizer() -> None:
    """Let Megatron-Core use `HostOptimizer`. Idempotent."""
    optimizer_package.HybridDeviceOptimizer = _Placeholder
    distrib_optimizer.HybridDeviceOptimizer = HostOptimizer


class HostOptimizer(HybridDeviceOptimizer):
    """AdamW that keeps fp32 weights and moments of a share of its parameters in host memory and updates them there.

    The parameters are on the device. `param_to_inner_param` has what each is updated as: a copy in page-locked memory,
    an fp32 copy on the device, or a view of itself.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose fp32 shards are views of the model's parameters that torch takes for results of them."""
        self.defaults["differentiable"] = True  # the one setting under which torch allows it
        super().add_param_group(param_group)
        del self.defaults["differentiable"], self.param_groups[-1]["differentiable"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as other optimizers have it: the groups without this one's own settings."""
        found = super().state_dict()
        own = self.defaults.keys() - _SAVED
        groups = [{key: value for key, value in group.items() if key not in own} for group in found["param_groups"]]
        return found | {"param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of this or another AdamW; this one's own settings stay."""
        groups = [self.defaults | group for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def fill_empty_states(self) -> None:
        """Create the state of parameters that were never updated."""
        for adam in self.sub_optimizers:
            for inner in _parameters(adam):
                if adam.state[inner]:
                    continue
                if hasattr(adam, "initialize_state"):  # Transformer Engine's
                    adam.initialize_state(inner, False)
                else:
                    adam.state[inner]["step"] = torch.tensor(0.0)
                    adam.state[inner] |= {name: torch.zeros_like(inner) for name in ("exp_avg", "exp_avg_sq")}
        self._sync_sub_optimizers_state_to_hdo()

    def update_fp32_param_by_new_param(self) -> None:
        """Update the copies by the parameters, fp32 ones too."""
        for parameter, inner in self.param_to_inner_param.items():
            inner.data.copy_(parameter.detach())

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[list, list, dict, dict, dict]:
        total = sum(parameter.numel() for parameter in _parameters(self))
        hosted, masters, hosted_size = {}, {}, 0
        host_groups, device_groups = [], []
        for group in self.param_groups:
            host_group, device_group = group | {"params": []}, group | {"params": []}
            for parameter in group["params"]:
                if hosted_size < offload_fraction * total:
                    inner = hosted[parameter] = _copy_to_host(parameter)
                    hosted_size += parameter.numel()
                    host_group["params"].append(inner)
                else:
                    inner = parameter.detach().float()  # of fp32 the same memory
                    device_group["params"].append(inner)
                if parameter not in hosted or parameter.dtype != torch.float32:
                    masters[parameter] = inner
            host_groups += [host_group] if host_group["params"] else []
            device_groups += [device_group] if device_group["params"] else []
        return host_groups, device_groups, hosted, {inner: one for one, inner in hosted.items()}, masters

    def _set_sub_optimizer_grads(self) -> None:
        for parameter, inner in self.param_to_inner_param.items():
            gradient = getattr(parameter, "decoupled_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is None:
                inner.grad = None
            elif parameter in self.gpu_params_map_cpu_copy:
                if inner not in self.cpu_copy_map_grad:
                    self.cpu_copy_map_grad[inner] = _pinned(inner.shape)
                inner.grad = self.cpu_copy_map_grad[inner]
                inner.grad.copy_(gradient, non_blocking=True)
            else:
                inner.grad = gradient.detach().to(inner.dtype)
        for adam in self.cpu_optimizers:
            self._cpu_optimizer_map_data_event[adam] = self._d2h_stream.record_event()

    def _sync_hdo_param_groups_to_sub_optimizers(self) -> None:
        # Transformer Engine's Adam counts its updates in its groups; the groups here have the count of the checkpoint.
        counts = [[group.get("step") for group in adam.param_groups] for adam in self.sub_optimizers]
        super()._sync_hdo_param_groups_to_sub_optimizers()
        for adam, own in zip(self.sub_optimizers, counts, strict=True):
            for group, count in zip(adam.param_groups, own, strict=True):
                if count is not None:
                    group["step"] = count

    def _move_new_state_to_right_device(self) -> None:
        for adam in self.sub_optimizers:
            device = portability.device() if adam is self.gpu_optimizer else torch.device("cpu")
            for inner, state in adam.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and name != "step":
                        # What was loaded is a part of a tensor of all data-parallel ranks, which it would keep.
                        state[name] = value.to(device, copy=True)
                self.state[self.inner_param_to_orig_param[inner]] = state

    def _update_fp32_params_by_new_state(self) -> None:
        for parameter, state in self.state.items():
            if "master_param" in state:
                self.param_to_inner_param[parameter].data.copy_(state["master_param"])


class _Placeholder(HostOptimizer):
    """Holds groups and settings until the distributed optimizer makes the real one of them, over its shards."""

    def _init_sub_optimizers(self) -> None:
        self.cpu_optimizers: list[torch.optim.Optimizer] = []
        self.gpu_optimizer = None


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _copy_to_host(parameter: Tensor) -> Tensor:
    copy = _pinned(parameter.shape)
    copy.copy_(parameter.detach())
    return copy


def _pinned(shape: torch.Size) -> Tensor:
    """Return an fp32 tensor in page-locked memory."""
    return portability.pinned_bytes(4 * shape.numel()).view(torch.float32).view(shape)
