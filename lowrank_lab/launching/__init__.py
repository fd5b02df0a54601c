"""Grids in other processes, here or on a cluster. No torch."""
