"""What keeps a root sound for years."""
