"""Keep the public path of the extension class that servers are started with (`--worker-extension-cls`)."""

from megatron_gkd.rollout.vllm.worker import WorkerExtension

__all__ = ["WorkerExtension"]
