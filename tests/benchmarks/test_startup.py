"""The launcher imports none of the libraries that only ranks need, and the benchmark reads what an import takes."""

import subprocess
import sys

from benchmarks.startup import LIBRARIES, slowest

# Also large, or imported by one of the libraries.
ONLY_IN_RANKS = {name.split(".")[0] for name in LIBRARIES} - {"torch"} | {
    "datasets",
    "peft",
    "vllm",
    "pyarrow",
    "tokenizers",
}


def test_launcher_imports_torch_alone():
    code = "import sys, megatron_gkd.launch.launcher; print(*{name.split('.')[0] for name in sys.modules})"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(finished.stdout.split())
    assert "torch" in imported and not imported & ONLY_IN_RANKS


def test_slowest_modules_come_first(tmp_path):
    report = tmp_path / "report.txt"
    header = "import time: self [us] | cumulative | imported package\n"
    report.write_text(header + "import time:  1000 |  9000 |   a.b\nnoise\nimport time: 3000 | 3000 | c\n")
    assert slowest(report, 2) == [(0.003, "c"), (0.001, "a.b")]
