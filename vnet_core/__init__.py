"""Pure functions: the numbers of V-Net and of what surrounds it. No file, network, clock or engine."""
