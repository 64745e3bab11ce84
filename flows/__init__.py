"""Prefect flows, their artifacts and deployments, and the command line."""
