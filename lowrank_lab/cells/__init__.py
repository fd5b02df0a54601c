"""What is asked for: configurations, cells and their keys, grids. No torch."""
