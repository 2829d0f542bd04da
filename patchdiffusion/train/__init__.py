"""Training: configuration, tasks, steps, loop, checkpoints and the log of a run."""
