"""What every program needs and nothing that knows diffusion: files, processes, devices, errors."""
