"""A run of the trainer as a stage."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart.stages import Stage
from quickstart.task import HERE

ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Training:
    """A run of the trainer. The recipe's own paths are those of seed 1.

    Attributes:
        title: the title of the stage.
        recipe: the name of the file in recipes/.
        output: the run's folder.
        start: the checkpoint that it starts from.
        rows: the training file. Its folder has the validation file, and each file's pictures in a folder of its name.
        seed: the run's seed.
        teacher: the teacher's checkpoint; None if there is none.
        is_own_teacher: whether `start` is the teacher.
    """

    title: str
    recipe: str
    output: Path
    start: Path
    rows: Path
    seed: int = 1
    teacher: Path | None = None
    is_own_teacher: bool = False

    def stage(self) -> Stage:
        """Return the stage that runs the trainer."""
        files = [self.rows, self.rows.with_name("validation.jsonl")]
        data = files + [file.with_suffix("") for file in files if file.with_suffix("").is_dir()]
        teacher = [] if self.teacher is None else [self.teacher]
        inputs = [self._path, self.start, *data, *teacher, ROOT / "megatron_gkd", str(self.seed)]
        return Stage(self.title, inputs, self.output / "hf", self._train)

    @property
    def _path(self) -> Path:
        return HERE / "recipes" / f"{self.recipe}.yaml"

    def _train(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        overrides = ["--model", self.start, "--seed", self.seed, "--output_dir", self.output, "--save_interval", "null"]
        overrides += ["--teacher_model", self.start] if self.is_own_teacher else []
        command = [sys.executable, "-m", "megatron_gkd", "train", self._path, "--nproc", "2", *overrides]
        subprocess.run([str(part) for part in command], check=True)
