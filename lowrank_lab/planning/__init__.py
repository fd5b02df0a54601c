"""The cost of a grid before anything is computed (``python run.py ... dry_run=true``)."""
