"""Objectives that are not plain denoising, and wrappers that change what one trains on."""
