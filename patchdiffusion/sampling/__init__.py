"""From noise to images: settings, the driver, and trained models ready to sample."""
