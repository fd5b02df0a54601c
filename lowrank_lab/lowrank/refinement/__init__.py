"""Answer 4 of a method: what is adjusted afterwards. One file an answer."""
