"""Synthetic faces, and conversion of other files into the input schema."""
