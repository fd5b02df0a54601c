"""Compressed models on disk, and what they say of themselves."""
