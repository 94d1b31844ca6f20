"""Reports on finished rounds: runs, plots, a page for one run, many runs side by side."""
