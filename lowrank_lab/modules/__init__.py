"""Modules that replace dense linears in a model, and their number formats."""
