"""What a night knows: its record, what failed before, what was decided, what it would cost."""
