"""Uses of a trained denoiser."""
