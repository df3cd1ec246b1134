"""The training loop: schedules, loss, optimizer, metrics."""
