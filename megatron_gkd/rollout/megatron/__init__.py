"""Sample with the sharded student itself."""
