"""Stage 4: neighbor table -> pruned, weighted graph."""
