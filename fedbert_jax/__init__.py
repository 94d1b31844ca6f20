"""FedBERT in JAX: organisations that may not share text pre-train one BERT together."""

__version__ = "0.1.0"
