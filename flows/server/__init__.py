"""The Prefect server: its settings, its process on this machine, and what is asked of its API."""
