"""Find ranks that hang, name them, and end the run in all ranks; end a run at once where one rank has failed.

Each rank has a thread that publishes the rank's mark (`runtime.current_phase`) in the store of the process group, over
a connection of its own. Where no rank makes progress any more, one of them compares the marks and names the ranks that
the others wait for. There are no collectives: a step costs nothing.
"""
