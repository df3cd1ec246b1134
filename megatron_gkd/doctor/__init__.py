"""Checks of a machine and its installation before a run; none of them trains, and none waits without an end."""
