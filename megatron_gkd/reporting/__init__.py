"""Reports of a run: what its console shows, and the records that it leaves. Only the main rank writes them."""

from megatron_gkd.reporting.curves import plot_curves, read_metrics
from megatron_gkd.reporting.metrics_log import MetricsLog
from megatron_gkd.reporting.progress import Progress, describe

__all__ = ["MetricsLog", "Progress", "describe", "plot_curves", "read_metrics"]
