"""Uses of a trained denoiser other than sampling."""
