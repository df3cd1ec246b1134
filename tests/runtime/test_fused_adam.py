"""The fallback of Transformer Engine's FusedAdam: torch's AdamW where nothing is rounded, and states of fewer bits."""

from __future__ import annotations

import pytest
import torch

from megatron_gkd.runtime.transformer_engine.fused_adam import MASTER, FusedAdam, join_remainders, split_master

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def parameters(dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 5), (300,), (0,))]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0**-step for shape in ((7, 5), (300,), (0,))]


def run(optimizer, owners, steps=range(4)) -> None:
    for step in steps:
        for owner, gradient in zip(owners, gradients(step), strict=True):
            owner.decoupled_grad = owner.grad = None
            if owner.dtype == torch.float32:
                owner.grad = gradient
            owner.decoupled_grad = gradient
        optimizer.step()


def reference(steps=range(4)):
    masters = [parameter.float() for parameter in parameters()]
    adam = torch.optim.AdamW(masters, **SETTINGS)
    run(adam, masters, steps)
    return masters, adam


def precise(owners, **options):
    return FusedAdam(owners, **SETTINGS, master_weights=True, use_decoupled_grad=True, **options)


def test_remainders_restore_every_fp32_number():
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0)).int()
    bits[:4] = torch.tensor([0, 0x8000, 0x18000, -1], dtype=torch.int64).int()
    weight = bits.view(torch.float32)
    weight = weight[weight.isfinite()]
    parameter, remainder = torch.empty_like(weight, dtype=torch.bfloat16), torch.empty_like(weight, dtype=torch.int16)
    split_master(weight, parameter, remainder)
    assert torch.equal(join_remainders(parameter, remainder).view(torch.int32), weight.view(torch.int32))
    nearest = weight.bfloat16()
    ties = remainder == -32768
    assert torch.equal(parameter[~ties], nearest[~ties])
    assert (remainder < 0).any() and ties.any()


@pytest.mark.parametrize("store_param_remainders", [True, False])
def test_fp32_states_give_the_bits_of_torchs_adamw(store_param_remainders):
    owners = parameters()
    adam = precise(owners, store_param_remainders=store_param_remainders)
    run(adam, owners)
    masters, expected = reference()
    for owner, master in zip(owners, masters, strict=True):
        state = adam.state[owner]
        assert state[MASTER].dtype == (torch.int16 if store_param_remainders else torch.float32)
        found = join_remainders(owner, state[MASTER]) if store_param_remainders else state[MASTER]
        assert torch.equal(found, master)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state[name], expected.state[master][name]), name
        assert torch.equal(owner, master.bfloat16())


def test_fp32_parameters_are_updated_in_place():
    owners = parameters(torch.float32)
    run(precise(owners), owners)
    expected = parameters(torch.float32)
    run(torch.optim.AdamW(expected, **SETTINGS), expected)
    assert all(torch.equal(a, b) for a, b in zip(owners, expected, strict=True))


@pytest.mark.parametrize(("name", "error"), [("bf16", 8e-3), ("fp16", 1e-3), ("fp8", 0.1)])
def test_moments_of_fewer_bits_are_near(name, error):
    owners = parameters()
    adam = precise(owners, exp_avg_dtype=TYPES[name], exp_avg_sq_dtype=TYPES[name])
    run(adam, owners)
    masters, expected = reference()
    for owner, master in zip(owners[:2], masters, strict=False):
        assert adam.state[owner]["exp_avg"].element_size() == (1 if name == "fp8" else 2)
        for moment in ("exp_avg", "exp_avg_sq"):
            found, exact = adam.get_unscaled_state(owner, moment), expected.state[master][moment]
            assert (found - exact).norm() <= error * exact.norm()
            assert not torch.equal(found, exact)


def test_scaling_factors_use_the_range_of_the_type():
    """Moments of 1e-12 would be zero in fp16 and FP8 without them."""
    for dtype in (torch.float16, torch.uint8):
        (owner,) = owners = [torch.zeros(64, dtype=torch.bfloat16)]
        adam = precise(owners, exp_avg_sq_dtype=dtype)
        owner.decoupled_grad = torch.linspace(1e-6, 2e-6, 64)
        adam.step()
        exact = owner.decoupled_grad.square() * (1 - SETTINGS["betas"][1])
        assert (adam.get_unscaled_state(owner, "exp_avg_sq") / exact - 1).abs().max() < 0.07


def test_fp16_master_weights_keep_what_bf16_loses():
    owners = parameters()
    adam = precise(owners, master_weight_dtype=torch.float16, store_param_remainders=True)
    run(adam, owners)
    for owner, master in zip(owners[:2], reference()[0], strict=False):
        assert adam.state[owner][MASTER].dtype == torch.float16
        error = (adam.get_unscaled_state(owner, MASTER) - master).norm()
        assert error < 0.3 * (owner.float() - master).norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_a_saved_state_goes_on_bit_by_bit(dtype):
    def build():
        owners = parameters()
        options = {"exp_avg_dtype": TYPES[dtype], "exp_avg_sq_dtype": TYPES[dtype]}
        return owners, precise(owners, store_param_remainders=True, **options)

    owners, adam = build()
    run(adam, owners, range(2))
    saved = adam.state_dict()
    assert all(
        value.dtype in (torch.float32, torch.int16) for state in saved["state"].values() for value in state.values()
    )
    again, other = build()
    for owner, source in zip(again, owners, strict=True):
        owner.copy_(source)
    other.load_state_dict(saved)
    for one, of in ((owners, adam), (again, other)):
        for owner in of.state:
            of.state[owner]["step"] = of.state[owner]["step"].clone()
        run(of, one, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(owners, again, strict=True))


def test_parameters_without_a_gradient_stay():
    owners = parameters()
    adam = precise(owners)
    adam.zero_grad()
    adam.step()
    assert all(torch.equal(a, b) for a, b in zip(owners, parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"master_weight_dtype": torch.bfloat16}, {"exp_avg_dtype": torch.int8}, {"exp_avg_sq_dtype": torch.float64}],
)
def test_types_that_transformer_engine_refuses_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        precise(parameters(), **options)
