"""An on-policy run of adapters: killed and continued, it is the run that was never killed, bit by bit.

`test_faults` has one that trains on rows, in bf16, and merges the adapters.
"""

from __future__ import annotations

from command_line import train
from faults.outcome import differences

KILLED = """
import os
import signal

import megatron_gkd.runtime.preload
from megatron_gkd import cli
from megatron_gkd.training.trainer import Trainer

def write(self, record, completions, write=Trainer.write):
    write(self, record, completions)
    if record["step"] == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.write = write
cli.run()
"""
"""The command line, killed after a step's record is written and before its checkpoint."""
OPTIONS = "--tuner_type lora --lora_rank 4 --lora_dropout 0.1 --save_interval 2 --async_save false --train_iters 4"
ON_POLICY = "--dtype fp32 --lmbda 0.5 --lmbda_granularity row --max_completion_length 8 --global_batch_size 4"


def test_a_killed_run_of_adapters_goes_on_bit_by_bit(workspace):
    options = (*OPTIONS.split(), *ON_POLICY.split(), "--export_interval", "null")
    finished = train(workspace, *options, "--output_dir", "runs/whole")
    assert finished.returncode == 0, finished.stderr
    (workspace / "killed.py").write_text(KILLED)
    assert train(workspace, *options, program="killed.py").returncode != 0
    assert not (workspace / "runs/x/adapters").exists()
    finished = train(workspace, *options)
    assert finished.returncode == 0, finished.stderr
    assert "resumed from runs/x/checkpoints/step-000002" in finished.stdout
    assert (workspace / "runs/whole/adapters/adapter_model.safetensors").is_file()
    assert not (workspace / "runs/whole/hf").exists()
    assert differences(workspace / "runs/x", workspace / "runs/whole") == []
