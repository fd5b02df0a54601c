"""Where models come from, how they are built, and how they are walked block by block."""
