"""Answer 4 of a method: how the factors are adjusted afterwards. One file an answer."""
