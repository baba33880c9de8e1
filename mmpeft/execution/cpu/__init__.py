"""Fast forms that only a CPU has."""
