"""Benchmarks of fedbert_jax: its speed against itself and against torch, and its cost per client that exists."""
