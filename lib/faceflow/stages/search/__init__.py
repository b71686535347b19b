"""Stage 3: the neighbor table, its recall estimate, and the groups of near-identical faces."""
