"""From text to training data: corpus, tokenizer, clients, packed token blocks."""
