"""Who calls the round: one process that simulates every client."""
