"""A run's directory: its files, its checkpoints, its metrics, and whether it may be gone on with."""
