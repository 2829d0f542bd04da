"""Frozen or separately trained networks that turn images into features."""
