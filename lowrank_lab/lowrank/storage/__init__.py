"""Answer 5 of a method: how the factors are kept. One file an answer."""
