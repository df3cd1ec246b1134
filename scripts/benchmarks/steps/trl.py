"""TRL's GKDTrainer as it comes from PyPI, in its own loop; a callback waits for the turns."""

from __future__ import annotations

import contextlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.peers import Unavailable
from benchmarks.steps.cases import BETA, CLIP_GRAD, OPTIMIZER, Case
from benchmarks.steps.peers_data import examples, load, lora_config, pad
from benchmarks.steps.turns import Turns

INSTALL = "pip install --no-deps --target peers trl accelerate && export PYTHONPATH=peers"
MANY_STEPS = 1000


class Contestant:
    """The process of GKDTrainer."""

    def __init__(self, rank: int, processes: int, root: Path) -> None:
        self._root = root

    def run(self, case: Case, folder: Path, turns: Turns) -> None:
        """Train until the last turn."""
        trainer = _trainer(case, folder, self._root)
        _time_phases(trainer, turns)
        trainer.add_callback(_callback(trainer, turns))
        with contextlib.suppress(_LastTurn):
            trainer.train()


def _trainer(case: Case, folder: Path, output: Path) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise Unavailable(_why(error), INSTALL) from error

    class Trainer(GKDTrainer):
        """GKDTrainer with the rows in their order, whose loss can be read."""

        losses: tuple = ()

        def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            self.losses = (*self.losses, loss.detach())
            return loss

    rows = examples(case)
    options = GKDConfig(
        output_dir=str(output),
        per_device_train_batch_size=case.microbatch_rows,
        gradient_accumulation_steps=len(rows) // case.microbatch_rows,
        max_steps=MANY_STEPS,
        learning_rate=OPTIMIZER["lr"],
        adam_beta1=OPTIMIZER["betas"][0],
        adam_beta2=OPTIMIZER["betas"][1],
        adam_epsilon=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
        max_grad_norm=CLIP_GRAD,
        lr_scheduler_type="constant",
        warmup_steps=0,
        lmbda=0.0,
        beta=BETA,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(
        model=load(folder / "student"),
        teacher_model=load(folder / "teacher"),
        args=options,
        data_collator=pad,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=lora_config() if case.has_lora else None,
    )


def _why(error: ImportError) -> str:
    try:
        return f"trl {metadata.version('trl')} can't be imported: {error}"
    except metadata.PackageNotFoundError:
        return "not installed"


def _tokenizer() -> Any:
    """Return a tokenizer that the trainer wants and does not use."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _time_phases(trainer: Any, turns: Turns) -> None:
    """Time the parts of the trainer's step; what is left of `training_step` is the backward pass."""
    clock = turns.clock
    for owner, method, phase in (
        (trainer, "training_step", "student"),
        (trainer.model, "forward", "student"),
        (trainer.teacher_model, "forward", "teacher"),
        (trainer, "generalized_jsd_loss", "head and loss"),
    ):
        setattr(owner, method, clock.around(phase, getattr(owner, method)))


def _callback(trainer: Any, turns: Turns) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        """Begins and ends the turns."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            trainer.losses = ()
            if not turns.begin():
                raise _LastTurn

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            turns.end(sum(loss.item() for loss in trainer.losses))

    return Callback()


class _LastTurn(Exception):
    """There are no more turns."""
