"""A run's directory: its files, checkpoints and metrics, and whether the run may be resumed."""
