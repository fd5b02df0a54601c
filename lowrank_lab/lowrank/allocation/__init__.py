"""Answer 3 of a method: where rank is spent. One file an answer."""
