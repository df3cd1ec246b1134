"""Sample with vLLM: in the training processes, or on servers."""
