"""Denoisers made of denoisers: ways to steer what a trained model samples."""
