"""General tools, independent of diffusion: files, processes, devices, errors, serialization."""
