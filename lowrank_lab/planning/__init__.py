"""What a grid will cost, before anything is computed (``python run.py ... dry_run=true``)."""
