"""Bad recipes."""

from __future__ import annotations

from pathlib import Path

from bad_inputs.case import Case
from bad_inputs.workspace import RECIPE, together, with_recipe, with_text


def without(section: str) -> str:
    """Return the recipe without a section."""
    return "".join(line for line in RECIPE.splitlines(keepends=True) if not line.startswith(section))


def value(name: str, old: str, new: str, message: str, arguments: tuple[str, ...] = ()) -> Case:
    """Return a case of one wrong value."""
    return Case(name, message, with_recipe(old, new), arguments)


def _remove(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()


def _make_a_folder(folder: Path) -> None:
    _remove(folder)
    (folder / "recipe.yaml").mkdir()


LR = "lr: 1.0e-3"
CASES = [
    Case("missing file", "recipe.yaml: can't be read: No such file", _remove),
    Case("folder", "recipe.yaml: can't be read: Is a directory", _make_a_folder),
    Case("empty", "recipe.yaml: must hold the sections", with_text("recipe.yaml", "")),
    Case("list", "recipe.yaml: must hold the sections", with_text("recipe.yaml", "- student\n- teacher\n")),
    Case("text", "recipe.yaml: must hold the sections", with_text("recipe.yaml", "student")),
    Case("not YAML", "not YAML", with_text("recipe.yaml", "student: {model: x\nteacher: ]")),
    Case("tab", "not YAML", with_text("recipe.yaml", "student:\n\tmodel: x\n")),
    Case("not UTF-8", "not YAML", with_text("recipe.yaml", b"student: {model: \xff\xfe}\n")),
    Case("binary", "not YAML", with_text("recipe.yaml", bytes(range(256)))),
    Case("a NUL", "output.output_dir", with_text("recipe.yaml", RECIPE.replace("runs/x", '"runs/\\0x"'))),
    Case("lone surrogate", "recipe.yaml", with_text("recipe.yaml", RECIPE.replace("runs/x", '"runs/\\ud800"'))),
    Case("key twice", "twice", with_recipe(LR, f"{LR}, {LR}")),
    Case("section twice", "twice", with_text("recipe.yaml", RECIPE + "train: {lr: 1}\n")),
    Case("nested too deeply", "not YAML", with_text("recipe.yaml", "a: " + "[" * 20_000)),
    Case(
        "aliases that grow",
        "not YAML",
        with_text(
            "recipe.yaml",
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        ),
    ),
    Case("alias of itself", "not YAML", with_text("recipe.yaml", "student: &a [*a]\n")),
    Case("far too long", "not YAML: has", with_text("recipe.yaml", RECIPE + "#" * 1_000_001)),
    Case("a tag of Python", "not YAML", with_recipe(LR, "lr: !!python/object/apply:os.getcwd []")),
    Case("unknown section", "did you mean train?", with_text("recipe.yaml", RECIPE + "training: {lr: 1}\n")),
    Case("near section", "did you mean distill?", with_recipe("distill: ", "distil:  ")),
    Case("near key", "did you mean train.lr", with_recipe(LR, "lrr: 1.0e-3")),
    Case("key of another section", "belongs in the section", with_recipe("beta: 0.5", "max_length: 5")),
    Case("no student", "student.model: missing", with_text("recipe.yaml", without("student"))),
    Case(
        "section is text", "must be a mapping", with_recipe("parallel: {tensor_model_parallel_size: 1}", "parallel: 1")
    ),
    value("beta above 1", "beta: 0.5", "beta: 1.5", "distill.beta = 1.5: must be a number in [0, 1]"),
    value("beta is NaN", "beta: 0.5", "beta: .nan", "distill.beta = nan: must be"),
    value("beta is text", "beta: 0.5", "beta: half", "distill.beta = half: must be"),
    value("lmbda is negative", "lmbda: 0.0", "lmbda: -0.1", "distill.lmbda = -0.1: must be"),
    value("lmbda is true", "lmbda: 0.0", "lmbda: true", "distill.lmbda = true: must be"),
    value("learning rate 0", LR, "lr: 0", "train.lr = 0: must be"),
    value("infinite learning rate", LR, "lr: .inf", "train.lr = inf: must be"),
    value("sexagesimal number", LR, "lr: 1.0e-3, seed: 1:30", "train.seed"),
    value("seed too large", LR, f"lr: 1.0e-3, seed: {2**70}", "train.seed"),
    value("too many epochs", "train_iters: 2", "num_train_epochs: 1e300", "train.num_train_epochs"),
    value("negative steps", "train_iters: 2", "train_iters: -2", "train.train_iters = -2: must be"),
    value("steps and epochs", "train_iters: 2", "train_iters: 2, num_train_epochs: 1", "train.num_train_epochs"),
    value("neither steps nor epochs", ", train_iters: 2", "", "train.train_iters"),
    value("unknown dtype", "dtype: fp32", "dtype: fp64", "train.dtype = fp64: must be"),
    value(
        "fractional batch", "global_batch_size: 2", "global_batch_size: 2.5", "train.global_batch_size = 2.5: must be"
    ),
    value(
        "batch as a list", "global_batch_size: 2", "global_batch_size: [2]", "train.global_batch_size = [2]: must be"
    ),
    value(
        "stop id beyond the vocabulary",
        "lmbda: 0.0",
        "lmbda: 1.0",
        "rollout.stop_token_ids = [9999]: must be",
        ("--stop_token_ids", "9999"),
    ),
    value(
        "top_k beyond the vocabulary", "lmbda: 0.0", "lmbda: 1.0", "rollout.top_k = 9999: must be", ("--top_k", "9999")
    ),
    value("no data", "dataset: [train.jsonl]", "dataset: []", "data.dataset = []: must be"),
    value("data is a number", "dataset: [train.jsonl]", "dataset: 3", "data.dataset = 3: must be"),
    value("missing data", "train.jsonl", "trian.jsonl", "data.dataset = trian.jsonl: must be"),
    value("negative weight", "[train.jsonl]", "[{path: train.jsonl, weight: -1}]", "data.dataset"),
    value("entry without a path", "[train.jsonl]", "[{weight: 1}]", "data.dataset"),
    value("length of 1", "max_length: 64", "max_length: 1", "data.max_length = 1: must be"),
    value("empty output_dir", "output_dir: runs/x", 'output_dir: ""', "output.output_dir"),
    value(
        "missing teacher model", "teacher_model: teacher", "teacher_model: nowhere", "teacher.teacher_model = nowhere"
    ),
    value("missing student", "{model: student}", "{model: nowhere}", "student.model = nowhere"),
    value("empty model", "{model: student}", '{model: ""}', "student.model"),
    value(
        "unknown kind of teacher", "{teacher_model: teacher}", "{teacher_kind: oracle}", "teacher.teacher_kind = oracle"
    ),
    value(
        "server without top-k", "{teacher_model: teacher}", "{teacher_model_server: 'http://x:1'}", "gkd_logits_topk"
    ),
    value(
        "port out of range",
        "{teacher_model: teacher}",
        "{teacher_model_server: 'http://x:99999'}",
        "teacher.teacher_model_server = http://x:99999: must be a list of",
    ),
    value(
        "cache of vLLM beside the embedded engine",
        "{max_completion_length: 8}",
        "{max_completion_length: 8, vllm_gpu_memory_utilization: 0.5}",
        "rollout.vllm_gpu_memory_utilization = 0.5: only with rollout.engine = vllm",
    ),
    value(
        "timeout of no rollout server",
        "{max_completion_length: 8}",
        "{max_completion_length: 8, vllm_server_timeout_s: 5}",
        "rollout.vllm_server_timeout_s = 5.0: only with rollout.engine = vllm_server",
    ),
    value(
        "timeout of no teacher server",
        "{teacher_model: teacher}",
        "{teacher_model: teacher, teacher_server_timeout_s: 5}",
        "teacher.teacher_server_timeout_s = 5.0: only with teacher.teacher_kind = server",
    ),
    value(
        "server without a scheme",
        "{teacher_model: teacher}",
        "{teacher_model_server: 'x:8000'}",
        "teacher_model_server",
    ),
    Case(
        "one server twice",
        "must name every server once",
        together(
            with_recipe("{teacher_model: teacher}", "{teacher_model_server: ['http://x:1', 'http://x:1']}"),
            with_recipe("beta: 0.5", "beta: 0.5, gkd_logits_topk: 4"),
        ),
    ),
    value(
        "model beside kind none",
        "{teacher_model: teacher}",
        "{teacher_model: teacher, teacher_kind: none}",
        "teacher_model",
    ),
    value("tensor parallel of no process", "size: 1}", "size: 2}", "must divide the number of processes (1)"),
    value(
        "context parallel of no process",
        "size: 1}",
        "size: 1, context_parallel_size: 2}",
        "must divide the number of processes (1)",
    ),
    value(
        "completion longer than a sequence",
        "max_completion_length: 8}",
        "max_completion_length: 64}",
        "rollout.max_completion_length",
        ("--lmbda", "1"),
    ),
    value(
        "plugin that is missing",
        "max_length: 64",
        "max_length: 64, external_plugins: p.py",
        "data.external_plugins = p.py",
    ),
    value("preprocessor of no plugin", "max_length: 64", "max_length: 64, preprocessor: mine", "preprocessor"),
    Case(
        "offload without a teacher",
        "offload_teacher_model",
        with_recipe("{teacher_model: teacher}", "{teacher_kind: none, offload_teacher_model: true}"),
    ),
    Case(
        "many mistakes at once",
        "recipe.yaml: ",
        together(
            with_recipe("beta: 0.5", "beta: 2"),
            with_recipe(LR, "lr: -1"),
            with_recipe("max_length: 64", "max_length: x"),
        ),
        lines=3,
    ),
]
