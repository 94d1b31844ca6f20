"""Console output: sentences and tables, progress bars, the stages of a preparation."""
