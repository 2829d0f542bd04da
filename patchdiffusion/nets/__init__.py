"""Networks: pure modules (x, noise, cond) -> output that know nothing of diffusion."""
