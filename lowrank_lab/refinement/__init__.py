"""Answer 4 of a method: what is done to the factors before they are stored. One file an answer."""
