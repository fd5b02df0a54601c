"""How weights are put into few bits, one linear at a time. One file a method."""
