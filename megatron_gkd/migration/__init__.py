"""Recipes from the scripts and configurations of ms-swift, TRL and NeMo-RL."""
