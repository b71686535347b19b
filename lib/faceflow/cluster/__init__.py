"""The only place that imports ray. Knows nothing of faces, files or graphs."""
