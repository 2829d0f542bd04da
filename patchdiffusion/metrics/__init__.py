"""Metrics: held-out losses, and distances between generated and real images."""
