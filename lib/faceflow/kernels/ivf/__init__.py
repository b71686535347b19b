"""The coarse quantizer: its training, how faces probe its cells, and which plan is less work."""
