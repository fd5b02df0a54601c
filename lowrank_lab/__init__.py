"""Low-rank compression of language models: one harness, every method, fair numbers."""

__version__ = "0.1.0"
