"""From stored volumes to fitted networks, on one worker or many."""
