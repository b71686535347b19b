"""What follows from modules: stable ids, singletons, constraints, quality, stability, scores."""
