"""From the totals of a step to the record that a user reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_gkd.config.schema import OutputSection
from megatron_gkd.reporting.completions_log import CompletionsLog, console_table, markdown_table
from megatron_gkd.reporting.curves import plot_curves
from megatron_gkd.reporting.metrics_log import MetricsLog
from megatron_gkd.reporting.progress import Progress
from megatron_gkd.reporting.start_report import StartReport
from megatron_gkd.runtime import portability
from megatron_gkd.training.rollout_report import RolloutReport


def summarize(totals: dict[str, float], *, has_teacher: bool) -> dict[str, float | None]:
    """Return means per response token of `training.loss.SUMS`, in nats.

    They are None where there is no token, and those that need a teacher where there is none.
    """
    tokens, dataset_tokens = totals["tokens"], totals["dataset_tokens"]

    def mean(name: str, *, is_known: bool = True) -> float | None:
        return totals[name] / tokens if tokens and is_known else None

    return {
        "loss": mean("loss"),
        "divergence": mean("divergence", is_known=has_teacher),
        "sft_loss": totals["cross_entropy"] / dataset_tokens if dataset_tokens else None,
        "num_tokens": int(tokens),
        "dropped_tokens": int(totals["dropped_tokens"]),
        "teacher_entropy": mean("teacher_entropy", is_known=has_teacher),
        "student_entropy": mean("student_entropy"),
        "forward_kl": mean("forward_kl", is_known=has_teacher),
        "reverse_kl": mean("reverse_kl", is_known=has_teacher),
        "top1_agreement": mean("top1_agreement", is_known=has_teacher),
    }


def describe_rollouts(
    report: RolloutReport, totals: dict[str, float], sync_seconds: float
) -> dict[str, float | int | str | None]:
    """What a step with sampled rows adds to its record. `sync_seconds`: that the engine took to get the weights.

    Both KL values estimate, in nats a token and at temperature 1, the divergence of the trainer's distribution from the
    engine's: the mean of ln p_engine - ln p_trainer over the sampled tokens. One of them is None:

    - `mismatch_kl` where the samples are of the weights that this step trains. It is near 0 where engine and trainer
      compute the same.
    - `staleness_kl` where they are of older weights (``steps_ahead``). It contains what the updates in between have
      changed. ``Rollouts.probe_mismatch`` measures `mismatch_kl` in some of these steps.

    The trainer's probabilities are over the ids that student and teacher share. vLLM's are over all of the student's:
    there both contain the logarithm of the share of the student's mass that is on shared ids.
    """
    tokens = totals["tokens"] - totals["dataset_tokens"]
    is_known = tokens and not totals["dropped_tokens"]  # the engine's sum is over all of them
    value = (report.log_prob + totals["student_cross_entropy"]) / tokens if is_known else None
    is_stale = report.staleness > 0
    return {
        **report.record(),
        "sync_time_s": sync_seconds,
        "mismatch_kl": None if is_stale else value,
        "staleness_kl": value if is_stale else None,
    }


class MismatchWarning:
    """Says so where the engine does not sample from the student: the first time, the second, the fourth, and so on.

    `threshold`: of the size of `mismatch_kl`, in nats a token; None never warns.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold, self.count = threshold, 0

    def of_step(self, step: int, mismatch_kl: float | None) -> str | None:
        if self.threshold is None or mismatch_kl is None or not abs(mismatch_kl) > self.threshold:  # NaN is no mismatch
            return None
        self.count += 1
        if self.count & (self.count - 1):
            return None
        return (
            f"warning: step {step}: mismatch_kl = {mismatch_kl:.4g} nats a token, beyond rollout.mismatch_kl_threshold "
            f"= {self.threshold:g} (steps so far: {self.count}): the rollout engine samples from another distribution "
            "than the student's. Look for other weights, another dtype, or another attention there; with one of "
            "those wanted, raise the threshold"
        )


class Reporter:
    """Writes metrics.jsonl and TensorBoard and shows progress, on the main rank; silent on the others."""

    def __init__(
        self,
        output_dir: Path,
        train_iters: int,
        output: OutputSection,
        *,
        is_main: bool,
        last_step: int | None = None,
    ) -> None:
        """`last_step`: of a run that is resumed; None for a new one."""
        self.output_dir, self.output, self.is_main = output_dir, output, is_main
        self.log = MetricsLog(output_dir, tensorboard=output.tensorboard, last_step=last_step) if is_main else None
        self.completions_log = CompletionsLog(output_dir, last_step) if is_main and output.log_completions else None
        self.progress = Progress(train_iters, enabled=is_main, log_interval=output.log_interval)

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.__exit__(*exception)
        if self.log is not None:
            self.log.close()
        if self.completions_log is not None:
            self.completions_log.close()

    def start(self, report: StartReport) -> None:
        """Show what the run starts with."""
        self.progress.show_lines(report.lines())

    def step(self, record: dict) -> None:
        record = {
            **record,
            "tokens_per_second": record["num_tokens"] / record["step_time_s"],
            "peak_memory_bytes": portability.peak_memory_bytes(),
        }
        if self.log is not None:
            self.log.write(record)
        self.progress.update(record["step"], record)

    def validation(self, record: dict) -> None:
        if self.log is not None:
            self.log.write({"split": "validation", **record})
        shown = ", ".join(f"{name} {record[name]:.4f}" for name in ("loss", "divergence") if record[name] is not None)
        self.message(f"step {record['step']}: validation {shown}")

    def completions(self, records: Sequence[dict]) -> None:
        """Of one step: all into completions.jsonl, and some into tables."""
        if self.completions_log is None or not records:
            return
        self.completions_log.write(records)
        shown = records[: self.output.completions_to_print]
        if shown:
            self.log.write_text("completions", markdown_table(shown), shown[0]["step"])
            self.progress.show(console_table(shown))

    def message(self, text: str) -> None:
        self.progress.message(text)

    def plot(self) -> Path | None:
        """The curves of the run as one PNG."""
        if not self.is_main:
            return None
        return plot_curves(self.output_dir / "metrics.jsonl", self.output_dir / "curves.png")
