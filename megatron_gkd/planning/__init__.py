"""What a recipe needs before it is started: memory, communication and time, without weights or GPUs."""
