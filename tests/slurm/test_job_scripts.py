"""The job scripts without a Slurm: its commands are replaced by scripts that note how they are called."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import finish, wait_for
from slurm.cluster import SCRIPTS
from slurm.recipe_values import values

from megatron_gkd.config.load import load

COMMANDS = {
    "scontrol": """
        case "$1" in
            show)
                case "$2" in
                    job) echo "   Command=$TRAIN --dataset a/b.jsonl" ;;
                    hostnames) echo node7 ;;
                    node) echo "   NodeAddr=127.0.0.1 NodeHostName=x" ;;
                esac
                ;;
            *) echo "$@" >>scontrol.log ;;
        esac""",
    "squeue": 'echo "${STATE:-RUNNING}"',
    "getent": "exit ${GETENT:-0}",
    "srun": r"""
        words="${*//$'\n'/ }"
        case "$*" in
            *recipe_values.py*) echo "output_dir=run" "rollout_options=student" "teacher_options=" ;;
            *--het-group=[12]*)
                echo "$SERVER | $FIRST_PORT | $VLLM_SERVER_DEV_MODE | $words" >>servers.log
                eval "${SERVERS_DO:-exec sleep 60}"
                ;;
            *)
                echo "$words" >>srun.log
                echo "${OMP_NUM_THREADS:-none} $NCCL_DEBUG" >environment.log
                eval "$TRAINING_DOES"
                ;;
        esac""",
}
"""The commands that the scripts call. `TRAINING_DOES` stands for the training."""
SAVED = "mkdir -p run/checkpoints/step-000004; exit 75"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("")
    return tmp_path


def start(folder: Path, *arguments: str, script: str = "train.sbatch", **variables: str) -> subprocess.Popen:
    values = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "TRAIN": str(SCRIPTS / script),
        "RECIPE": "recipe.yaml",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "TRAINING_DOES": "exit 0",
    }
    (folder / "slurm_script").write_bytes((SCRIPTS / script).read_bytes())  # as Slurm copies it
    return subprocess.Popen(
        ["bash", "slurm_script", *arguments],
        cwd=folder,
        env=values | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def job(folder: Path, *arguments: str, **how: str) -> tuple[int, str]:
    """Run a job; return its exit code and output."""
    process = start(folder, *arguments, **how)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def calls(folder: Path, name: str) -> list[str]:
    log = folder / f"{name}.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RECIPE": ""}, "RECIPE is not set: name the recipe, RECIPE=recipe.yaml sbatch ...\n"),
        ({"RECIPE": "none.yaml"}, "RECIPE = none.yaml: no such file, seen from {folder}\n"),
        ({"NPROC": "0"}, "NPROC = 0: must be an integer >= 1, or gpu\n"),
        ({"MAX_REQUEUES": "many"}, "MAX_REQUEUES = many: must be an integer >= 0\n"),
    ],
)
def test_a_mistake_is_one_line_and_2(variables, message, folder):
    assert job(folder, **variables) == (2, message.format(folder=folder))
    assert not calls(folder, "srun")


def test_a_script_that_was_not_submitted_says_so():
    command = ["bash", str(SCRIPTS / "train.sbatch")]
    finished = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=30)
    assert (finished.returncode, finished.stderr) == (2, "SLURM_JOB_ID is not set: submit this script by sbatch\n")


def test_each_node_gets_a_launcher_with_the_overrides(folder):
    code, output = job(folder, "--lr", "1 e", SLURM_CPUS_ON_NODE="24", NPROC="4", SRUN_ARGS="--container-image=x")
    assert code == 0, output
    (call,) = calls(folder, "srun")
    assert call.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 ") and " --container-image=x " in call
    assert not calls(folder, "scontrol"), "not requeued"
    assert calls(folder, "environment") == ["6 WARN"]
    assert "train recipe.yaml --lr 1 e --nproc 4 --nnodes 2 --rdzv node7:20123" in call


def test_variables_that_are_set_stay(folder):
    job(folder, MASTER_ADDR="10.0.0.1", MASTER_PORT="77", NCCL_DEBUG="INFO", OMP_NUM_THREADS="3", NPROC="1")
    assert "--rdzv 10.0.0.1:77" in (folder / "srun.log").read_text()
    assert calls(folder, "environment") == ["3 INFO"]


def test_an_interrupted_run_is_requeued_until_it_makes_no_progress(folder):
    for number in range(3):
        code, output = job(folder, TRAINING_DOES=SAVED, MAX_REQUEUES="2", SLURM_RESTART_COUNT=str(number))
        assert code == 75 and f"start {number + 1}:" in output and "common.sh" not in output
    assert calls(folder, "scontrol") == ["requeue 123"] * 2
    assert "not requeued again, 2 times without a checkpoint after step-000004 (MAX_REQUEUES)" in output
    job(folder, TRAINING_DOES=SAVED.replace("04", "05"), MAX_REQUEUES="2")
    assert calls(folder, "scontrol") == ["requeue 123"] * 3, "there is a new checkpoint"


@pytest.mark.parametrize(("does", "state", "code"), [(SAVED, "COMPLETING", 75), ("exit 2", "RUNNING", 2)])
def test_neither_a_failure_nor_a_canceled_job_is_requeued(does, state, code, folder):
    assert job(folder, TRAINING_DOES=does, STATE=state)[0] == code
    assert not calls(folder, "scontrol")


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_forwarded(signum, folder):
    does = 'trap "echo USR1 >received; exit 75" USR1; touch ready; while :; do sleep 0.1; done'
    process = start(folder, TRAINING_DOES=does)
    wait_for((folder / "ready").exists)
    process.send_signal(signum)
    assert finish(process) == 75
    assert (folder / "received").exists() and calls(folder, "scontrol") == ["requeue 123"]


def test_a_signal_before_the_launcher_handles_it_is_an_interruption(folder):
    process = start(folder, TRAINING_DOES="touch ready; exec sleep 60")
    wait_for((folder / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == 75 and calls(folder, "scontrol") == ["requeue 123"]


HETEROGENEOUS = {
    "script": "train_with_servers.sbatch",
    "SLURM_HET_SIZE": "3",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "node9",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
    "SLURM_NTASKS_PER_NODE_HET_GROUP_1": "2",
    "SLURM_JOB_NODELIST_HET_GROUP_2": "node10",
    "SLURM_JOB_NUM_NODES_HET_GROUP_2": "1",
    "TEACHER_MODEL": "the teacher",
    "GETENT": "2",
    "READY_WITHIN_S": "2",
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TEACHER_MODEL": ""}, "TEACHER_MODEL is not set: name the model of the teacher servers\n"),
        ({"SERVERS": "rollout"}, "SERVERS = rollout: needs 2 components, this job has 3: sbatch --nodes N"),
        ({"SERVERS": "rollout rollout"}, "SERVERS = rollout rollout: must name each kind once\n"),
        ({"SERVERS": "rollout student"}, "SERVERS = rollout student: must be rollout, teacher, or both\n"),
        ({"SLURM_HET_SIZE": ""}, "SERVERS = rollout teacher: needs 3 components, this job has 1: sbatch --nodes N"),
    ],
)
def test_a_mistake_with_servers_is_one_line_and_2(variables, message, folder):
    code, output = job(folder, **HETEROGENEOUS | variables)
    assert code == 2 and output.startswith(message) and output.count("\n") == 1
    assert not calls(folder, "srun") and not calls(folder, "servers")


def test_servers_that_are_not_ready_in_time_end_the_job_with_69(folder):
    code, output = job(folder, **HETEROGENEOUS)
    assert code == 69 and not calls(folder, "srun")
    assert (
        "rollout server http://127.0.0.1:30123: not ready after 2 s (READY_WITHIN_S); see run/logs/rollout_*.log"
        in output
    )
    rollout, teacher = sorted(calls(folder, "servers"))
    assert rollout.startswith("vllm serve student ") and " | 30123 | 1 | --het-group=1 --nodes=1 --ntasks=2 " in rollout
    assert (
        teacher.startswith(r"vllm serve the\ teacher ")
        and " | 31123 | 0 | --het-group=2 --nodes=1 --ntasks=1 " in teacher
    )


def test_a_signal_while_the_servers_start_requeues_the_job(folder):
    process = start(folder, **HETEROGENEOUS | {"READY_WITHIN_S": "60"})
    wait_for(lambda: len(calls(folder, "servers")) == 2)
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == 75
    assert calls(folder, "scontrol") == ["requeue 123"] and not calls(folder, "srun")


def test_servers_that_end_before_they_are_ready_end_the_job_with_69(folder):
    code, output = job(folder, **HETEROGENEOUS, SERVERS_DO="exit 3")
    assert code == 69 and "servers have ended with exit code 3 before they were ready" in output


def test_what_the_scripts_take_from_a_recipe(workspace):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / "recipe_values.py"), "2", *arguments]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parents[1])}
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=60)

    finished = run("1", "recipe.yaml", "--output_dir", "runs/my run", "--gkd_logits_topk", "20")
    assert finished.returncode == 0, finished.stderr
    values = finished.stdout.splitlines()
    assert values[0] == "output_dir='runs/my run'" and values[1].endswith("--max-model-len 256'")
    assert values[2] == "teacher_options='--max-model-len 257 --max-logprobs 20'"
    finished = run("1", "recipe.yaml", "--beta", "2")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "recipe.yaml: distill.beta = 2: must be a number in [0, 1]\n"


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ((), ["--max-model-len", "256"]),
        (("--weight_sync", "nccl"), ["--max-model-len", "256", "--weight-transfer-config", '{"backend": "nccl"}']),
        (
            ("--weight_sync", "lora", "--tuner_type", "lora", "--lora_rank", "12"),
            ["--max-model-len", "256", "--enable-lora", "--max-lora-rank", "16"],
        ),
    ],
)
def test_rollout_servers_have_the_options_of_the_weight_sync(overrides, options, workspace):
    sampling = ("--lmbda", "0.5", "--engine", "vllm_server", "--vllm_server_urls", "http://node7:30000")
    recipe = load(workspace / "recipe.yaml", [*sampling, *overrides], world_size=2, require_paths=False)
    assert shlex.split(values(recipe)["rollout_options"]) == [recipe.student.model, *options]
