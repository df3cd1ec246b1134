"""The command that checks a machine and its installation: doctor."""

from megatron_gkd.commands.parts import Work, print_text, take
from megatron_gkd.errors import CommandRefused, GkdError


def doctor(path: str, arguments: list[str], _: int) -> Work:
    """Check this machine, and a recipe where `path` is not empty, whatever the number of processes that run."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.DOCTOR)
    if overrides and not path:
        raise CommandRefused(
            f"megatron-gkd doctor {overrides[0]}: only after a recipe; the options are --nproc, --json"
        )
    from megatron_gkd.doctor.recipe import open_subject

    subject = open_subject(path or None, overrides, options["nproc"])

    def work() -> None:
        from megatron_gkd.doctor.examination import examine
        from megatron_gkd.doctor.report import line_of, summary_of, to_json

        findings = []
        for finding in examine(subject):
            findings.append(finding)
            if not options["json"]:
                print_text(line_of(finding))
        print_text(to_json(findings) if options["json"] else summary_of(findings))
        failed = list(dict.fromkeys(finding.name for finding in findings if finding.status == "failed"))
        if failed:
            raise GkdError(f"megatron-gkd doctor: failed: {', '.join(failed)}")

    return work
