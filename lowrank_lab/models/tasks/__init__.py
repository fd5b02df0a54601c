"""What a model is for: how it is loaded and called, and what its loss is."""
