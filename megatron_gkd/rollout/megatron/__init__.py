"""Sampling with the sharded student itself."""
