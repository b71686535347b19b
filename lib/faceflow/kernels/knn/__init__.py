"""Exact products, top-k lists, searches over tiles, on CPU and GPU."""
