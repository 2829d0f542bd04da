"""Data sets: sources of images, decoding, packs, and batches of crops for training."""
