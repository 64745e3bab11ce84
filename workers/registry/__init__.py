"""Model bundles, who is champion, and model cards."""
