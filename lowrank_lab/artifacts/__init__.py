"""What is made once and kept: the store, and the locks of those who share it. No torch."""
