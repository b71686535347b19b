"""The two-level map equation: flow, moves, search; and the infomap package beside it."""
