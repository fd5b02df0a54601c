"""What stands in a model in the place of a dense linear, and the number formats in it."""
