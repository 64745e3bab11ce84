"""What runs by itself: deployments and forms, when nights are due, what is watched, and what people are told."""
