"""BERT as three pure functions: embed on the client, transform on the server, predict on the client."""
