"""From a stored volume to a published mask: one case, a very large one, and a pool of actors."""
