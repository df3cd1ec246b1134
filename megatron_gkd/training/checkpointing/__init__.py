"""Training checkpoints: all that a run needs to be resumed bit for bit."""
