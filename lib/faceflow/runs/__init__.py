"""Runs of an OUTPUT: order of stages, registry, lease, status, housekeeping. No algorithms."""
