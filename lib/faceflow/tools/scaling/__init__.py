"""Time against the number of faces and nodes, and the laws fitted to it."""
