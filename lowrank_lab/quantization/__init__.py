"""Quantization: fewer bits for each number, while low rank and pruning keep fewer numbers."""
