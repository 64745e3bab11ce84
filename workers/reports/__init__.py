"""Rows, what is told of them, and answers over all nights."""
