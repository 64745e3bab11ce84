"""Peers that are trained on the same cases for the same minutes; each script is a process of its own."""
