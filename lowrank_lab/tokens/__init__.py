"""Tokens: an encoder that goes on with fewer of them, while its weights stay. One file for each rule."""
