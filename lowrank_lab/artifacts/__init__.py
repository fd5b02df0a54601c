"""Artifacts: the store that keeps what is computed, and the locks of the processes that share it. No torch."""
