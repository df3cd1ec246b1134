"""The report: a line for each finding, or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from megatron_gkd import __version__
from megatron_gkd.doctor.finding import Finding

FORMAT = 1
"""Version of the JSON: raised where a field changes its meaning or goes; new fields may come."""


def line_of(finding: Finding) -> str:
    """Return a finding as text; a remedy is on a line of its own."""
    line = f"{finding.status:<8} {finding.name:<26} {finding.text}"
    return f"{line}\n{'':<35} -> {finding.remedy}" if finding.remedy else line


def count_by_status(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of findings of each status."""
    counts = Counter(finding.status for finding in findings)
    return {status: counts[status] for status in ("ok", "warning", "failed")}


def summary_of(findings: Sequence[Finding]) -> str:
    """Return the last line of the report."""
    return ", ".join(f"{count} {status}" for status, count in count_by_status(findings).items())


def to_json(findings: Sequence[Finding]) -> str:
    """Return all findings as JSON."""
    report = {
        "format": FORMAT,
        "megatron_gkd": __version__,
        "counts": count_by_status(findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=1)
