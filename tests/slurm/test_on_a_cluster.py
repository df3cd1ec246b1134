"""The job scripts on a real Slurm, over two nodes, and with servers on further ones: `bash scripts/test_slurm.sh`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import slow_steps
import yaml
from command_line import train
from faults.configurations import CONFIGURATIONS, SAMPLING, Configuration, K, teacher_model, write_rows
from faults.outcome import differences, records
from faults.student_server import StudentServer
from launching import wait_for
from slurm.cluster import SCRIPTS, Job, run, submit
from teachers.fake_server import FakeServer

STEPS = 40
WITH_SERVERS = Configuration(
    (
        SAMPLING,
        {"parallel": {"tensor_model_parallel_size": 2}},
        {"rollout": {"engine": "vllm_server", "vllm_server_max_downtime_s": 10.0}},
        {"teacher": {"teacher_server_max_downtime_s": 10.0}, "distill": {"gkd_logits_topk": K}},
    ),
    has_teacher=False,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    tmp_path.chmod(0o755)
    write_rows(tmp_path)
    slow_steps.write_plugin(tmp_path)
    return tmp_path


def write_recipe(folder: Path, configuration: Configuration, steps: int) -> None:
    recipe = configuration.recipe(steps)
    recipe["data"] = recipe["data"] | {"external_plugins": [slow_steps.PLUGIN]}
    recipe["output"] = recipe["output"] | {"output_dir": "runs/x"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def num_steps(folder: Path) -> int:
    return slow_steps.num_steps(folder / "runs/x")


def wait_for_steps(job: Job, count: int) -> None:
    job.wait_until(lambda: num_steps(job.folder) >= count, 150)


def test_two_nodes_preempted_and_at_the_time_limit_equal_an_uninterrupted_run(folder):
    write_recipe(folder, CONFIGURATIONS["offline TP2"], STEPS)
    slow_steps.slow_down(folder, 0.3)
    job = submit(folder, "--nodes", "2", "--time", "30", str(SCRIPTS / "train.sbatch"), MASTER_ADDR="127.0.0.1")

    wait_for_steps(job, 4)
    slow_steps.slow_down(folder, 1.5)  # for the next start: Slurm looks for time limits every 30 s
    run("scontrol", "requeue", str(job.number))  # as a preemption
    job.start_again(1)
    first = num_steps(folder)
    assert 4 <= first < STEPS

    wait_for_steps(job, first + 3)
    run("scontrol", "update", f"jobid={job.number}", "TimeLimit=3")  # within the 300 s of --signal
    job.start_again(2)
    assert first + 3 <= num_steps(folder) < STEPS
    slow_steps.speed_up(folder)
    job.wait_for_end(150)

    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 2), job.log
    assert f"job {job.number}: Slurm has requeued or canceled it (COMPLETING)" in job.log
    (requeue,) = (folder / "runs/x/logs/requeues").read_text().splitlines()
    assert requeue.split()[:2] == [str(job.number), f"step-{json.loads(run_step(job.log)):06d}"]
    assert [f"start {number}: recipe.yaml on " in job.log for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert (folder / "runs/x/logs/node_1.log").exists() and (folder / "runs/x/logs/rank_1.log").exists()
    assert "2 processes on 2 nodes" in job.log

    finished = train(folder, "--output_dir", "runs/whole")
    assert finished.returncode == 0, finished.stderr
    (folder / "runs/whole/logs").mkdir(exist_ok=True)
    assert differences(folder / "runs/x", folder / "runs/whole") == []


def run_step(log: str) -> str:
    """Return the step of the checkpoint that the second start has saved."""
    return log.rpartition("SIGUSR1: stopped after step ")[2].partition(" ")[0]


def test_servers_and_training_end_together_and_go_on_together(folder):
    write_recipe(folder, WITH_SERVERS, 14)
    server = f"{os.path.join(os.path.dirname(__file__), 'fake_servers.py')}"
    slow_steps.slow_down(folder, 0.3)
    job = submit(
        folder,
        *("--nodes", "2", "--time", "30", ":", "--nodes", "1", "--ntasks-per-node", "2", ":", "--nodes", "1"),
        str(SCRIPTS / "train_with_servers.sbatch"),
        ROLLOUT_SERVER=f'"$PYTHON" {server} rollout',
        TEACHER_SERVER=f'"$PYTHON" {server} teacher --checkpoint {teacher_model()}',
    )
    wait_for_steps(job, 4)
    pids = {file: int(file.read_text()) for file in (folder / "servers").glob("*.pid")}
    assert len(pids) == 3 and "the servers are ready: http://" in job.log
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    job.start_again(1)
    assert num_steps(folder) < 14 and "servers have ended; stopping the training" in job.log
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()), 30)
    slow_steps.speed_up(folder)
    job.wait_for_end(150)

    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    wait_for(lambda: not job.processes(), 30)
    weights = [file for file in (folder / "servers").glob("*.log") if "collective_rpc" in file.read_text()]
    assert len(weights) == 2, "both rollout servers, but not the teacher's, load the student's weights"
    with StudentServer() as one, StudentServer() as other, FakeServer(Path(teacher_model())) as teacher:
        urls = ("--vllm_server_urls", one.url, other.url, "--teacher_model_server", teacher.url)
        finished = train(folder, *urls, "--output_dir", "runs/whole")
    assert finished.returncode == 0, finished.stderr
    whole = records(folder / "runs/whole")
    assert {"student", "mixed"} & {record.get("source") for record in whole}
    assert records(folder / "runs/x") == whole
