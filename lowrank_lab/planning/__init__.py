"""What a grid will cost, told before anything is computed (``python run.py ... dry_run=true``)."""
