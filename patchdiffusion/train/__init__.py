"""Training: configuration, step, loop, checkpoints and the log of a run."""
