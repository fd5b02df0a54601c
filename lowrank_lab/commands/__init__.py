"""What is typed: ``lowrank-lab run …`` and ``lowrank-lab report …``; in a checkout also run.py and report.py."""
