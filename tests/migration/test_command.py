"""`megatron-gkd migrate`: files, tools and options that can't be used, and settings that are not carried over."""

import subprocess
import sys

import pytest

SWIFT = "megatron rlhf --rlhf_type gkd --model m --teacher_model t --dataset d.jsonl --train_iters 3"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("none.sh", None, "none.sh: can't be read: No such file or directory"),
        ("a.sh", "echo hello\n", "a.sh: has no command that is known: megatron rlhf, swift rlhf, a script of TRL"),
        ("a.sh", "megatron rlhf 'x\n", "a.sh: line 1: a quote (') is not closed"),
        ("a.sh", "", "a.sh: has no command that is known"),
        ("a.sh", "megatron rlhf --rlhf_type dpo --model m\n", "a.sh: --rlhf_type = dpo: must be gkd"),
        ("a.yaml", "a: [\n", "a.yaml: can't be read: line 2: "),
        ("a.yaml", "- 1\n", "a.yaml: must be a mapping of settings"),
        ("a.yaml", "x: 1\n", "a.yaml: settings of no tool that is known; name the tool with --from swift|trl|nemo"),
        ("a.sh", "python examples/run_distillation_math.py\n", "a.sh: line 1: python "
         "examples/run_distillation_math.py: "),
        ("a.sh", "python run_distillation.py --config no.yaml\n", "no.yaml: can't be read: No such file or directory"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_used(workspace, name, text, problem):
    if text is not None:
        (workspace.folder / name).write_text(text)
    code, out, err = workspace.run("migrate", name)
    assert (code, out) == (2, "") and err.startswith(problem) and err.count("\n") == 1
    assert not (workspace.folder / "recipe.yaml").exists()


def test_bytes_that_are_no_text(workspace):
    (workspace.folder / "a.sh").write_bytes(b"\xff\xfe\x00")
    assert workspace.run("migrate", "a.sh") == (2, "", "a.sh: can't be read: is no text\n")


def test_a_folder(workspace):
    (workspace.folder / "a.sh").mkdir()
    assert workspace.run("migrate", "a.sh") == (2, "", "a.sh: can't be read: Is a directory\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "megatron-gkd migrate: the script or configuration must come first: megatron-gkd migrate args.sh"),
        (["a.sh", "--from", "verl"], "--from = verl: must be swift, trl or nemo"),
        (["a.sh", "--beta", "1"], "megatron-gkd migrate --beta: unknown; the options are --from, --output"),
        (["a.sh", "--output", "kept.yaml"], "--output = kept.yaml: exists already; must be a file that does not"),
        (["a.sh", "--output", "no/r.yaml"], "--output = no/r.yaml: can't be written: No such file or directory"),
    ],
)
def test_wrong_command_lines(workspace, arguments, problem):
    (workspace.folder / "a.sh").write_text(SWIFT)
    (workspace.folder / "kept.yaml").write_text("kept\n")
    assert workspace.run("migrate", *arguments) == (2, "", f"{problem}\n")
    assert (workspace.folder / "kept.yaml").read_text() == "kept\n"


def test_help_names_the_options(workspace):
    code, out, _ = workspace.run("migrate", "--help")
    assert code == 0 and "--from  swift, trl or nemo" in out and "--lmbda" not in out


def test_migrate_imports_no_torch(workspace):
    script = "import sys; from megatron_gkd.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, "migrate", "swift_dense.sh"], check=True, timeout=60)
    assert (workspace.folder / "recipe.yaml").exists()


def test_what_is_missing_is_listed(workspace):
    recipe, report = workspace.migrate_text("megatron rlhf --rlhf_type gkd --lmbda 0 --train_iters 3\n")
    assert "To add:\n  student.model: the student" in report and "data.dataset: " in report
    assert recipe["train"]["train_iters"] == 3


def test_values_that_the_schema_refuses_are_listed(workspace):
    recipe, report = workspace.migrate_text(f"{SWIFT} --beta 7 --attention_backend unfused --lr abc\n")
    assert "distill.beta = 7: must be a number in [0, 1]" in report
    assert "train.attention_backend = unfused: must be one of auto, flash, fused, sdpa" in report
    assert "train.lr = abc: must be a number > 0" in report
    assert "lr" not in recipe["train"] and "beta" not in recipe["distill"]


def test_what_check_would_refuse_is_listed(workspace):
    _, report = workspace.migrate_text(f"NPROC_PER_NODE=2 {SWIFT} --tensor_model_parallel_size 4\n")
    assert "To correct:\n  parallel.tensor_model_parallel_size x " in report


def test_variables_that_only_a_shell_knows(workspace):
    recipe, report = workspace.migrate_text(f"{SWIFT} --lr $LR --output_dir runs/$(date +%s)\n")
    assert "--lr = $LR: has a variable or command that only a shell can expand" in report
    assert "--output_dir = runs/$(date +%s): has a variable" in report
    assert recipe["output"]["output_dir"] == "megatron_output/m"


def test_unknown_options(workspace):
    _, report = workspace.migrate_text(f"{SWIFT} --new_thing 1 stray --old\n")
    assert "--new_thing = 1 stray: unknown; no key of a recipe has this name" in report
    assert "--old = true: unknown" in report


def test_a_setting_under_two_names(workspace):
    recipe, report = workspace.migrate_text(f"{SWIFT} --save_steps 5 --save_interval 6\n")
    assert recipe["output"]["save_interval"] == 6
    assert "--save_steps = 5: save_interval is set, too" in report


def test_several_nodes(workspace):
    _, report = workspace.migrate_text(f"NNODES=2 NODE_RANK=0 MASTER_ADDR=n0 NPROC_PER_NODE=8 {SWIFT}\n")
    assert "megatron-gkd train recipe.yaml --nproc 8 --nnodes 2 --rdzv HOST:29400\n" in report
    assert "MASTER_ADDR" not in report


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("torchrun --nproc_per_node 4 swift/cli/_megatron/rlhf.py", 4),
        ("torchrun --nproc-per-node=4 --nnodes=2 swift/cli/rlhf.py", 4),
        ("accelerate launch --num_processes=8 --num_machines 2 x/swift/cli/rlhf.py", 4),
        ("CUDA_VISIBLE_DEVICES=0,3,5 swift rlhf", 3),
        ("/opt/bin/swift rlhf", 1),
    ],
)
def test_the_number_of_processes(workspace, launcher, processes):
    _, report = workspace.migrate_text(f"{launcher} {SWIFT.removeprefix('megatron rlhf')}\n")
    assert f"--nproc {processes}" in report
    assert ("the number of processes is not in the file" in report) == (launcher == "/opt/bin/swift rlhf")


def test_a_config_file_beside_options(workspace):
    (workspace.folder / "args.yaml").write_text("beta: 0.25\nlmbda: 0\nmodel: a\n")
    recipe, _ = workspace.migrate_text("megatron rlhf --config args.yaml --model b --dataset d.jsonl --lr 1e-4\n")
    assert (recipe["student"]["model"], recipe["distill"]["beta"], recipe["train"]["lr"]) == ("b", 0.25, 1e-4)
    _, report = workspace.run("migrate", "args.sh", "--output", "other.yaml")[:2]
    assert "--config" not in report


def test_a_yaml_file_of_swift(workspace):
    recipe, _ = workspace.migrate_text(
        "rlhf_type: gkd\nmodel: s\nteacher_model: t\ndataset: [d.jsonl]\nlmbda: 0\nmicro_batch_size: "
        "2\nsave_steps: 4\n",
        "args.yaml",
    )
    assert recipe["output"]["save_interval"] == 4 and recipe["train"]["micro_batch_size"] == 2


def test_the_tool_can_be_named(workspace):
    text = "python my.py --model_name_or_path s --teacher_model_name_or_path t\n"
    recipe, _ = workspace.migrate_text(text, "a.sh", "--from", "trl")
    assert recipe["teacher"]["teacher_model"] == "t" and recipe["train"]["global_batch_size"] == 8


def test_a_script_of_nemo_with_overrides(workspace):
    recipe, _ = workspace.migrate_text(
        "uv run examples/run_distillation_math.py --config nemo_base.yaml policy.model_name=/models/s "
        "++loss_fn.kl_type=forward cluster.gpus_per_node=4\n"
    )
    assert recipe["student"]["model"] == "/models/s" and recipe["distill"]["beta"] == 0.0


def test_a_configuration_without_its_base(workspace):
    (workspace.folder / "nemo_base.yaml").unlink()
    _, report = workspace.migrate("nemo_megatron.yaml")
    assert "defaults = nemo_base.yaml: there is no such file beside the configuration" in report
    assert "To add:" in report


def test_the_student_as_its_fixed_teacher(workspace):
    recipe, _ = workspace.migrate_text(f"{SWIFT} --model t --tuner_type lora --lora_rank 4 --lmbda 0\n")
    assert recipe["teacher"] == {"teacher_kind": "self", "teacher_model": "t"} and recipe["lora"] == {"lora_rank": 4}


def test_keys_of_adapters_without_adapters(workspace):
    recipe, report = workspace.migrate_text(f"{SWIFT} --lora_rank 4 --lmbda 0\n")
    assert "lora" not in recipe and "lora.lora_rank = 4: only with tuner_type lora" in report


@pytest.mark.parametrize(
    ("limit", "lengths"),
    [
        ("", (700, 500, None)),
        ("--vllm_max_model_len 650", (700, 450, 650)),
        ("--vllm_max_model_len 900", (700, 500, None)),
        ("--vllm_max_model_len 200", (700, 500, None)),
    ],
)
def test_lengths_of_prompts_and_completions(workspace, limit, lengths):
    recipe, _ = workspace.migrate_text(
        f"{SWIFT} --lmbda 1 --use_vllm true --vllm_mode colocate --max_length 500 --max_completion_length 200 {limit}\n"
    )
    data, rollout = recipe["data"], recipe["rollout"]
    assert (data["max_length"], data["max_prompt_length"], rollout.get("vllm_max_model_len")) == lengths


def test_packing_counts_rows(workspace):
    recipe, report = workspace.migrate_text(f"{SWIFT} --packing true --micro_batch_size 4 --lmbda 0\n")
    assert recipe["train"]["micro_batch_size"] == 1 and "train.global_batch_size: counts rows here" in report
