"""Dask and Ray: where they run, how they are started or joined, and what a lost worker costs."""
