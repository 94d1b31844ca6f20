"""The federation: one split step, the averaging, and a round for each strategy."""
