"""Pruning: weights that are set to zero and stay zero. One file for each rule."""
