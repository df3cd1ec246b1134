"""What a run shows while it goes, and what it leaves to be read afterwards. Used by one rank."""

from megatron_gkd.reporting.curves import plot_curves, read_metrics
from megatron_gkd.reporting.metrics_log import MetricsLog
from megatron_gkd.reporting.progress import Progress, describe

__all__ = ["MetricsLog", "Progress", "describe", "plot_curves", "read_metrics"]
