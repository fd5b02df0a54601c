"""Weights set to zero, and kept as zeros. One file a rule."""
