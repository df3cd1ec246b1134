"""Whole training steps of several implementations, each in processes of its own, one step after the other."""
