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
    kernels = {"K1": contestant(1.0), "K2": contestant(1.0), "K3": contestant(1.0)}
    run = run_of(
        "cuda",
        divergence=[
            targets.LARGE | {"beta": 0.5, "contestants": {OURS: contestant(0.0069), "Liger JSD": contestant(0.1)}},
            targets.LARGE | {"beta": 0.0, "contestants": {OURS: contestant(0.0060)}},
        ],
        kernels=[
            targets.LARGE
            | {"beta": 0.5, "copy": copy, "moved_bytes": {"K1": 95, "K2": 80, "K3": 90}, "contestants": kernels}
        ],
    )
    run["divergence"][0]["contestants"]["ms-swift"] = contestant(0.2) | {"status": "not installed", "total_s": []}
    assert verdicts(run) == {
        "K1, share of a copy's bandwidth": ("0.95", "met"),
        "K2, share of a copy's bandwidth": ("0.80", "missed by 6%"),
        "K3, share of a copy's bandwidth": ("0.90", "met"),
        "forward and backward at β 0.5 on an H100, ms": ("6.90", "met"),
        "forward and backward at β 0 on an H100, ms": ("6.00", "missed by 20%"),
        "forward and backward at β 1 on an H100, ms": ("", "not measured"),
        "times as fast as Liger JSD, β 0.5": ("14.49", "met"),
        "times as fast as ms-swift, β 0.5": ("", "not measured"),
        "fused head over its four products, H = 3584": ("", "not measured"),
    }
