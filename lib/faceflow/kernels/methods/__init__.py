"""Published clustering methods to compare with, each on the same neighbor table."""
