"""Answer 5 of a method: how the factors are stored. One file an answer."""
