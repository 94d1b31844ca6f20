"""What is kept from whom: what a run's settings amount to."""
