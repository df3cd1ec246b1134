"""Where the program meets the machine: devices, Transformer Engine's stand-ins, process groups, seeds."""
