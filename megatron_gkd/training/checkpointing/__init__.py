"""Training checkpoints: everything that a run needs to go on bit by bit."""
