"""Records in, tables and figures out. Nothing here computes a result."""
