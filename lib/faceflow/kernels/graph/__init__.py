"""Edge recipes, compressed sparse rows, shared neighbors, near-identical faces."""
