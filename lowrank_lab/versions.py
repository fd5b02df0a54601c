"""Versions of the components that make numbers. They enter the keys of artifacts and records.

Raise one when a change to the component changes what it computes: old artifacts are then no longer found.
Refactoring, speed and logging do not count. Library versions are written into every record instead.
"""

MODEL = 1  # models/load.py: conversion of GGUF files
TOKENS = 1  # calibration/tokens.py
STATISTICS = 1  # calibration/statistics.py
GRADIENTS = 1  # calibration/gradients.py
SPECTRA = 1  # lowrank/solver.py, lowrank/spectra.py, metric/
COMPRESSION = 1  # allocation/, refinement/, storage/, training.py, the rest of lowrank/
PERPLEXITY = 1  # evaluation/perplexity.py
SPEED = 1  # evaluation/timing.py
GENERATION = 1  # evaluation/generation.py, evaluation/text.py
OUTPUT_ERROR = 1  # evaluation/block_errors.py
TRUNCATION = 1  # evaluation/one_truncated.py
HARNESS = 1  # evaluation/harness.py, lm.py, tasks.py, task_data.py
RECORD = 2  # the schema of results.py


def current() -> dict[str, int]:
    """All of the above by name, for the record: a report leaves out records of other versions."""
    return {name: value for name, value in globals().items() if name.isupper()}
