"""Sampling from the student."""
