"""What leaves the root: masks for those who read them, corrections for training."""
