"""Weights and formats of other projects."""
