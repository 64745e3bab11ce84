"""What comes in: trees, archives, manifests and scans, judged before they are read."""
