"""Targets are read off a run: met, missed by so much, or not measured."""

from benchmarks import targets
from benchmarks.measure import OURS


def contestant(seconds, peak=None):
    return {
        "status": "ok",
        "install": "",
        "error": 0.0,
        "first_s": [seconds],
        "total_s": [seconds],
        "peak_bytes": [peak],
    }


def run_of(device_type, **sections):
    environment = {
        "device": "device",
        "device_type": device_type,
        "date": "today",
        "torch": "2",
        "implementation": "torch",
        "threads": 1,
    }
    return {"environment": environment, "divergence": [], "head": [], **sections}


def verdicts(run):
    return {row[0]: row[2:] for row in targets.section(run).rows}


def test_cpu_targets():
    case = targets.LARGE_ON_CPU | {
        "result_bytes": 1000,
        "contestants": {OURS: contestant(2.0, 1010), "eager torch": contestant(10.0, 3000)},
    }
    assert verdicts(run_of("cpu", divergence=[case])) == {
        "times as fast as eager torch, 512 × 151936 in fp32": ("5.00", "missed by 17%"),
        "extra memory over that of eager torch": ("0.50%", "met"),
    }


def test_gpu_targets():
    copy = {"moved_bytes": 100, "seconds": [1.0]}
    kernels = {name: contestant(1.0) for name in ("K1", "K2", "K3", "K3 with the cross-entropy")}
    moved = {"K1": 95, "K2": 80, "K3": 90, "K3 with the cross-entropy": 89}
    run = run_of(
        "cuda",
        divergence=[
            targets.LARGE
            | {
                "beta": 0.5,
                "copy": copy,
                "total_bytes": 0.6,
                "contestants": {OURS: contestant(0.0069), "Liger JSD": contestant(0.1)},
            },
            targets.LARGE | {"beta": 0.0, "copy": copy, "total_bytes": 0.41, "contestants": {OURS: contestant(0.005)}},
        ],
        kernels=[targets.LARGE | {"beta": 0.5, "copy": copy, "moved_bytes": moved, "contestants": kernels}],
    )
    run["divergence"][0]["contestants"]["ms-swift"] = contestant(0.2) | {"status": "not installed", "total_s": []}
    assert verdicts(run) == {
        "K1, share of a copy's bandwidth": ("0.95", "met"),
        "K1 as in training, share of a copy's bandwidth": ("", "not measured"),
        "K2, share of a copy's bandwidth": ("0.80", "missed by 6%"),
        "K3, share of a copy's bandwidth": ("0.90", "met"),
        "K3 with the cross-entropy, share of a copy's bandwidth": ("0.89", "missed by 1%"),
        "forward and backward at β 0.5, share of a copy's bandwidth": ("0.87", "met"),
        "forward and backward at β 0, share of a copy's bandwidth": ("0.82", "met"),
        "forward and backward at β 1, share of a copy's bandwidth": ("", "not measured"),
        "times as fast as Liger JSD, β 0.5": ("14.49", "met"),
        "times as fast as ms-swift, β 0.5": ("", "not measured"),
        "fused head as in training over its four products, H = 3584": ("", "not measured"),
    }
