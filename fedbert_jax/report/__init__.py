"""What is read off finished rounds: runs, plots, a page of one run, many runs side by side."""
