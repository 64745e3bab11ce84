"""Measurements that are written down with their machine, commit and command."""
