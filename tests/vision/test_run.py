"""A recipe with images trains from files to an export, with the same losses under every kind of parallelism."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import train
from PIL import Image
from safetensors.torch import load_file
from vision_checkpoints import tiny_vision_checkpoint

COMMON = (
    "--max_length 256 --dtype fp32 --global_batch_size 4 --train_iters 3 --adam_eps 1e-3 "
    "--freeze_vit false --freeze_aligner false --vit_lr 5e-4 --packing true --max_patches 96 --export_interval 3 "
    "--sequence_parallel false --tensor_model_parallel_size 1"
).split()
LAYOUTS = {
    "TP2+SP": "--tensor_model_parallel_size 2 --sequence_parallel true",
    "PP2": "--pipeline_model_parallel_size 2",
    "CP2": "--context_parallel_size 2",
    "DP2": "",
}


def write_rows(folder: Path) -> None:
    """Write rows with two images, one, and none; some have a video in place of the first of two."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(12):
        parts: list[dict] = []
        for number in range((2, 0, 1)[index % 3]):
            name = f"{index}-{number}.png"
            height, width = draw.integers(16, 40, 2)
            if index % 6 == 3 and number == 0:
                frames = [Image.fromarray(draw.integers(0, 256, (24, 16, 3), dtype=np.uint8)) for _ in range(4)]
                frames[0].save(folder / f"{index}.gif", save_all=True, append_images=frames[1:])
                parts.append({"type": "video", "video": f"{index}.gif"})
                continue
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
            parts.append({"type": "image", "image": name})
        words = " ".join(f"w{draw.integers(60)}" for _ in range(draw.integers(3, 9)))
        user = {"role": "user", "content": [*parts, {"type": "text", "text": words}]}
        rows.append({"messages": [user, {"role": "assistant", "content": f"w1 {words}"}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(workspace: Path, layout: str, processes: int) -> tuple[list[dict], dict]:
    """Train and return the steps' metrics and the exported weights."""
    output = workspace / "runs" / (layout or "one").replace(" ", "")
    models = [f"--model={tiny_vision_checkpoint('qwen3_vl_tied', seed=2)}"]
    models += [f"--teacher_model={tiny_vision_checkpoint('qwen3_vl', seed=1)}"]
    finished = train(workspace, *models, *COMMON, *layout.split(), "--output_dir", str(output), processes=processes)
    assert finished.returncode == 0, finished.stderr
    assert "parameters, all trainable" in finished.stdout
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if "grad_norm" in step], load_file(output / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    from command_line import write_workspace

    folder = tmp_path_factory.mktemp("images")
    write_workspace(folder)
    write_rows(folder)
    return folder, *run(folder, "", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_exports_are_those_of_one_process(layout, one_process):
    folder, expected, weights = one_process
    found, exported = run(folder, LAYOUTS[layout] or "--context_parallel_size 1", 2)
    assert [step["step"] for step in found] == [1, 2, 3]
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found] == pytest.approx([step[key] for step in expected], rel=1e-5)
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        assert (exported[name] - weight).norm() <= 1e-5 * weight.norm(), name
