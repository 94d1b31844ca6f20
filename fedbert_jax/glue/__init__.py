"""GLUE: its tasks and metrics, fine-tuning on them, and the table."""
