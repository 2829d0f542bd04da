"""Sampling: its settings, the driver, and trained models ready to sample."""
