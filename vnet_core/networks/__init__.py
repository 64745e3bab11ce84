"""Networks, each a plain torch module built from its part of the plan."""
