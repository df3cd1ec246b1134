"""PyTorch fallback for Transformer Engine's FusedAdam, which keeps its state in less than fp32.

The constructor, the methods that Megatron-Core calls and the stored values are those of Transformer Engine 2.8; the
update is torch's AdamW, so that fp32 state gives the bits of `torch.optim.AdamW`. It is a class of that, with a `step`
for each parameter, since Megatron-Core's checkpoints without Transformer Engine expect it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MASTER, STATES = "master_param", ("exp_avg", "exp_avg_sq", "master_param")
_FP8 = torch.float8_e4m3fn
_RANGES = {torch.float16: torch.finfo(torch.float16).max / 2, torch.uint8: torch.finfo(_FP8).max}
"""The value that the largest of a tensor is scaled to, for the types that have a scaling factor."""


class FusedAdam(torch.optim.AdamW):
    """AdamW with moments and master weights in types of their own.

    Args:
        params: see ``torch.optim.AdamW``, as the others without a description.
        lr: see above.
        betas: see above.
        eps: see above.
        weight_decay: see above.
        bias_correction: must be true.
        adam_w_mode: must be true.
        master_weights: keep a copy of the weights that is more precise than these.
        master_weight_dtype: of that copy: fp32, or fp16 with a scaling factor for each tensor.
        exp_avg_dtype: of the first moment: fp32, bf16, or with a scaling factor fp16 and uint8, which means FP8 E4M3.
        exp_avg_sq_dtype: of the second moment.
        use_decoupled_grad: read gradients from `decoupled_grad`, whose dtype may be another than the parameter's.
        store_param_remainders: of fp32 master weights of bf16 parameters, store only the 16 bits that these lack.
    """

    def __init__(  # noqa: PLR0913  (the arguments are Transformer Engine's)
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if not (bias_correction and adam_w_mode):
            raise ValueError("the PyTorch fallback of FusedAdam has bias correction and decoupled weight decay only")
        if master_weights and master_weight_dtype not in (torch.float32, torch.float16):
            raise ValueError(f"master_weight_dtype = {master_weight_dtype}: must be fp32 or fp16")
        for dtype in (exp_avg_dtype, exp_avg_sq_dtype):
            if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.uint8):
                raise ValueError(f"a moment's type is {dtype}; it must be fp32, bf16, fp16 or uint8 for FP8")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.store_param_remainders = store_param_remainders and master_weights and master_weight_dtype == torch.float32
        self.name_to_dtype_map = dict(zip(STATES, (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype), strict=True))
        self._scales: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients that `step` reads."""
        if not self.use_decoupled_grad:
            super().zero_grad(set_to_none)
            return
        for parameter in chain.from_iterable(group["params"] for group in self.param_groups):
            if set_to_none:
                parameter.decoupled_grad = None
            elif parameter.decoupled_grad is not None:
                parameter.decoupled_grad.zero_()

    def initialize_state(self, parameter: Tensor, store_param_remainders: bool | None = None) -> None:
        """Create the state of a parameter before its first update; a master weight is the parameter's value."""
        state = self.state[parameter]
        state["step"] = torch.tensor(0.0)
        for name in STATES[:2]:
            self._create(parameter, name)
        if self.master_weights:
            self._create(parameter, MASTER)
            if not self._has_remainders(parameter):
                self.set_scaled_state(parameter, MASTER, parameter.detach().clone().float())

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """Return a state in fp32, a new tensor where it is stored in another type; remainders as the int16 they are."""
        stored = self.state[parameter][name]
        if name not in STATES or stored.dtype in (torch.float32, torch.int16):
            return stored
        unscaled = stored.float()
        scale = self._scales.get(parameter, {}).get(name)
        return unscaled if scale is None else unscaled.mul_(scale)

    def set_scaled_state(self, parameter: Tensor, name: str, unscaled: Tensor) -> None:
        """Store an fp32 state in its type, with a scaling factor where that has one; remainders as int16."""
        if name not in STATES:
            self.state[parameter][name] = unscaled
            return
        if name not in self.state[parameter]:
            self._create(parameter, name)
        stored = self.state[parameter][name]
        scale = self._scales.get(parameter, {}).get(name)
        if scale is None:
            stored.copy_(unscaled)
            return
        if unscaled.numel():
            torch.div(unscaled.abs().max(), _RANGES[self.name_to_dtype_map[name]], out=scale[0])
        stored.copy_(unscaled * torch.where(scale > 0, scale.reciprocal(), 0.0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        result = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.initialize_state(parameter)
                gradient = getattr(parameter, "decoupled_grad", None) if self.use_decoupled_grad else parameter.grad
                if gradient is not None:
                    self._update(parameter, gradient.float(), group)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state as fp32, remainders as int16."""
        found = super().state_dict()
        for index, parameter in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            if index in found["state"]:
                names = found["state"][index]
                found["state"][index] = {name: self.get_unscaled_state(parameter, name) for name in names}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; torch's own would convert it to the parameters' types."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, parameter in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            for name, value in state_dict["state"].get(index, {}).items():
                self.set_scaled_state(parameter, name, value)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        moments = [self.get_unscaled_state(parameter, name) for name in STATES[:2]]
        if parameter.dtype == torch.float32:
            weight = parameter.detach()
        elif self._has_remainders(parameter):
            weight = join_remainders(parameter.detach(), state[MASTER])
        elif self.master_weights:
            weight = self.get_unscaled_state(parameter, MASTER)
        else:
            weight = parameter.detach().float()
        beta1, beta2 = group["betas"]
        adamw(
            [weight],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(STATES[:2], moments, strict=True):
            if state[name] is not moment:
                self.set_scaled_state(parameter, name, moment)
        if parameter.dtype == torch.float32:
            return
        if self._has_remainders(parameter):
            split_master(weight, parameter.detach(), state[MASTER])
            return
        parameter.detach().copy_(weight)
        if self.master_weights and state[MASTER] is not weight:
            self.set_scaled_state(parameter, MASTER, weight)

    def _has_remainders(self, parameter: Tensor) -> bool:
        return self.store_param_remainders and parameter.dtype == torch.bfloat16

    def _create(self, parameter: Tensor, name: str) -> None:
        if name == MASTER and self._has_remainders(parameter):
            self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.int16)
            return
        dtype = self.name_to_dtype_map[name]
        self.state[parameter][name] = torch.zeros_like(parameter, dtype=_FP8 if dtype == torch.uint8 else dtype)
        if dtype in _RANGES:
            scale = torch.ones(1, dtype=torch.float32, device=parameter.device)
            self._scales.setdefault(parameter, {})[name] = scale


def join_remainders(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 weights of bf16 parameters and the int16 bits that these lack.

    The parameter is the weight rounded half up, so that its last bit is one too high where the remainder is negative.
    """
    upper = parameter.contiguous().view(torch.int16).int() - (remainder < 0).int()
    return ((upper << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def split_master(weight: Tensor, parameter: Tensor, remainder: Tensor) -> None:
    """Overwrite bf16 parameters and int16 remainders by what `join_remainders` makes the fp32 `weight` of."""
    bits = weight.contiguous().view(torch.int32)
    remainder.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)  # the lower 16 bits with their sign
    parameter.copy_(((bits >> 16) + (remainder < 0).int()).to(torch.int16).view(torch.bfloat16))
