"""What a user asks for: configurations, cells and their keys, grids. No torch."""
