"""What a run will need on a given machine: forecast from a sample, and its cost."""
