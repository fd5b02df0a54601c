"""Quantization: how many bits a number is kept in, beside how many numbers there are."""
