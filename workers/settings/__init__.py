"""What a site decides."""
